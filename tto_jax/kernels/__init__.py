"""One folder an op: `reference` is its specification, `api` its only door."""
