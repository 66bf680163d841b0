"""Whether a mathematical answer is right: extraction, cheap equality, symbolic equality, killable workers."""
