"""transformers' `generate` as a peer of the rollout. Arrays: prompts i32[N,P], full."""

import time

import numpy as np

from tto_jax.bench.peer import serve, torch_peak


def load(flags, arrays):
    """Samples `new` tokens a prompt, without log-probs; `logprobs` is a forward pass."""
    import torch
    import transformers

    torch.set_num_threads(flags.threads)
    model = transformers.AutoModelForCausalLM.from_pretrained(flags.model, dtype=getattr(torch, flags.dtype))
    model = model.to(flags.device).eval()
    model.generation_config = transformers.GenerationConfig(  # no stop token: every row has all its tokens
        do_sample=True, temperature=1.0, top_k=0, top_p=1.0, max_new_tokens=flags.new, pad_token_id=0
    )
    prompts = torch.from_numpy(arrays["prompts"]).long().to(flags.device)

    @torch.inference_mode()
    def work():
        out = model.generate(prompts, attention_mask=torch.ones_like(prompts))
        if out.shape != (prompts.shape[0], prompts.shape[1] + flags.new):
            raise RuntimeError(f"generate gave {tuple(out.shape)}: not {flags.new} tokens for each of {prompts.shape}")
        if flags.device != "cpu":
            torch.cuda.synchronize()
        return {"cpu_s": time.process_time()}

    @torch.inference_mode()
    def logprobs(tokens):
        tokens = torch.from_numpy(np.load(tokens)).long().to(flags.device)
        logits = model(tokens).logits[:, -flags.new - 1 : -1].float()
        found = torch.log_softmax(logits, -1).gather(-1, tokens[:, -flags.new :, None])[..., 0]
        return {"logprobs": found.tolist()}

    return {"work": work, "logprobs": logprobs} | torch_peak(flags.device)


if __name__ == "__main__":
    serve(load, {"model": str, "new": int, "dtype": str}, ("torch", "transformers"))
