"""The same adaptation by PEFT, as a peer: on this model in plain PyTorch, and on transformers' own Llama.

`PeftRun` has the steps of `lora_train.Run`. On this model the adapters are ours, number by number, from the same start,
so that the losses can be compared step by step. On transformers' Llama, as PEFT is used, q, k and v have one each and
so do gate and up: more numbers, another loss.
"""

from __future__ import annotations

import time

import torch
import torch.nn.functional as F

import genai_kernels as gk
from python_models.char_lm_train import Recipe
from python_models.llama_train import CHECKPOINT
from python_models.lora_methods import TARGETS, Sizes
from python_models.lora_train import Passages, new_run

WITHOUT_DROPOUT = Sizes(dropout=0.0)  # PEFT draws another mask
HF_TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


class PeftRun:
    """A training run by PEFT and PyTorch alone.

    Args:
        where: "this model" or "transformers".
        recipe, text, length: as of `lora_train.Run`.
    """

    def __init__(self, where: str, recipe: Recipe, text: torch.Tensor, *, length: int = 256) -> None:
        import peft

        sizes = WITHOUT_DROPOUT
        options = {"r": sizes.rank, "lora_alpha": sizes.alpha, "lora_dropout": 0.0}
        if where == "transformers":
            import transformers

            transformers.logging.set_verbosity_error()
            model = transformers.AutoModelForCausalLM.from_pretrained(CHECKPOINT, dtype=torch.float32)
            torch.manual_seed(recipe.seed)
            self.model = peft.get_peft_model(model, peft.LoraConfig(target_modules=HF_TARGETS, **options)).train()
        else:
            # a full run's model is the plain one
            plain = new_run("full", recipe, text, length=length).adapted.model
            self.model = peft.get_peft_model(plain, peft.LoraConfig(target_modules=list(TARGETS), **options))
            start = new_run("lora", recipe, text, sizes=sizes, length=length).named
            for name, p in self.model.named_parameters():
                if p.requires_grad:
                    ours = name.removeprefix("base_model.model.").replace(".default.weight", "")
                    with torch.no_grad():
                        p.copy_(start[ours])
        self.where, self.recipe = where, recipe
        self.batches = Passages(text, recipe.batch, length, recipe.seed)
        learning = [p for p in self.model.parameters() if p.requires_grad]
        self.parameters = sum(p.numel() for p in learning)
        self.optimizer = torch.optim.AdamW(learning, lr=0.0, betas=(0.9, 0.95), weight_decay=0.0, fused=True)
        self.learning = learning
        self.losses: list[float] = []
        self.seconds: list[float] = []

    def _loss(self, tokens: torch.Tensor, following: torch.Tensor) -> torch.Tensor:
        if self.where == "transformers":
            logits = self.model(tokens, use_cache=False).logits
            return F.cross_entropy(logits.flatten(0, 1), following.flatten())
        return self.model.base_model.model.loss(tokens, following)

    def step(self) -> float:
        """Takes one step and returns its loss."""
        tokens, following = next(self.batches)
        begin = time.perf_counter()
        for group in self.optimizer.param_groups:
            group["lr"] = self.recipe.rate(len(self.losses))
        with gk.use_backend("reference"):
            loss = self._loss(tokens, following)
            loss.backward()
        torch.nn.utils.clip_grad_norm_(self.learning, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.losses.append(loss.item())
        self.seconds.append(time.perf_counter() - begin)
        return self.losses[-1]
