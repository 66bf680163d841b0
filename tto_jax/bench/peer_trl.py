"""A GRPO step of TRL as a peer of the update. Arrays: tokens i32[N,P+C], advantage f32[N], old_logprob f32[N,C].

Its own trainer with its own loss (`dr_grpo`: summed over tokens, over a constant) on rows without padding, put where
it keeps those that it samples. Gradients are summed over micro-batches of `micro_rows` rows.
"""

import tempfile
import time

import numpy as np

from tto_jax.bench.peer import serve, torch_peak

REMAT = {"none": False, "full": True}  # ours: checkpointing of every layer


def load(flags, arrays):
    """A step with clip by norm and AdamW at a rate that changes nothing, as in `tto_jax.bench.update`."""
    import torch
    import transformers

    torch.set_num_threads(flags.threads)
    tokens, old = torch.from_numpy(arrays["tokens"]).long(), torch.from_numpy(arrays["old_logprob"])
    rows, new = old.shape
    batch = {
        "prompt_ids": tokens[:, :-new],
        "prompt_mask": torch.ones_like(tokens[:, :-new]),
        "completion_ids": tokens[:, -new:],
        "completion_mask": torch.ones_like(tokens[:, -new:]),
        "advantages": torch.from_numpy(arrays["advantage"]),
        "old_per_token_logps": old,
    }
    model = transformers.AutoModelForCausalLM.from_pretrained(flags.model, dtype=torch.float32)
    if REMAT[flags.remat]:
        model.gradient_checkpointing_enable()
    trainer = make_trainer(model, rows, new, flags)
    model, optimizer = trainer.accelerator.prepare(trainer.model, trainer.create_optimizer())
    device, parts = trainer.accelerator.device, trainer.args.steps_per_generation
    batch = {name: x.to(device) for name, x in batch.items()}
    # Rows sampled before, and a step at which none are due: `training_step` trains on these.
    trainer._buffered_inputs = [{name: x[part::parts] for name, x in batch.items()} for part in range(parts)]
    trainer._step, trainer.current_gradient_accumulation_steps = parts, parts

    def work():
        loss = sum(trainer.training_step(model, None, None) for _ in range(parts))
        norm = trainer.accelerator.clip_grad_norm_(model.parameters(), trainer.args.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        return {"cpu_s": time.process_time(), "loss": float(loss), "grad_norm": float(norm)}

    @torch.no_grad()
    def logprobs(tokens):
        tokens = torch.from_numpy(np.load(tokens)).long().to(device)
        found, *_ = trainer._get_per_token_logps_and_entropies(model, tokens, torch.ones_like(tokens), new)
        return {"logprobs": found.tolist()}

    return {"work": work, "logprobs": logprobs} | torch_peak(flags.device)


def make_trainer(model, rows, new, flags):
    """A trainer that keeps the rows it is given for all steps; its tokenizer and its problems are never looked at."""
    import datasets
    import tokenizers
    import transformers
    import trl

    parts = rows // flags.micro_rows
    options = trl.GRPOConfig(
        output_dir=tempfile.gettempdir(),
        use_cpu=flags.device == "cpu",
        bf16=flags.dtype == "bfloat16",
        gradient_checkpointing=REMAT[flags.remat],
        per_device_train_batch_size=flags.micro_rows,
        gradient_accumulation_steps=parts,
        num_generations=rows,
        num_iterations=2**30,  # steps on the same rows
        max_completion_length=new,
        loss_type="dr_grpo",
        beta=0.0,
        temperature=1.0,
        learning_rate=1e-12,
        lr_scheduler_type="constant",
        weight_decay=0.01,
        max_grad_norm=1.0,
        report_to="none",
    )
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({"word": 0}, unk_token="word"))
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=words, eos_token="word", pad_token="word")
    problems = datasets.Dataset.from_dict({"prompt": ["word"] * rows})
    return trl.GRPOTrainer(model, lambda **_: [], options, problems, processing_class=tokenizer)


if __name__ == "__main__":
    kinds = {"model": str, "dtype": str, "remat": str, "micro_rows": int}
    serve(load, kinds, ("trl", "torch", "transformers"))
