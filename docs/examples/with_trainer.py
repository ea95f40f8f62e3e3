"""The Hugging Face Trainer: ``torchrun --nproc_per_node 2 docs/examples/with_trainer.py [ddp | fsdp]``."""

import sys
from tempfile import TemporaryDirectory

import torch
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

import comoving


def optimizer_of(model):
    """With names, so that embeddings, head, norms and biases stay dense."""
    return comoving.AdamW(model.named_parameters(), lr=1e-2, rank=0.25)


class ComovingTrainer(Trainer):
    """Builds the optimizer where the Trainer would build its own; ``optimizers=`` is refused with FSDP."""

    build = staticmethod(optimizer_of)

    def create_optimizer(self, model=None):
        """Once, for the model as the Trainer has it."""
        if self.optimizer is None:
            self.optimizer = self.build(self.model if model is None else model)
        return self.optimizer


def small():
    """A LLaMA of two layers."""
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=32,
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=16,
            use_cache=False,
        )  # fmt: skip
    )


def train(model, data, how="ddp", trainer=ComovingTrainer, **options):
    """One pass over data, rows of token ids: batches of four a process."""
    if how == "fsdp":
        layers = {"version": 2, "auto_wrap_policy": "TRANSFORMER_BASED_WRAP"}
        options |= {"fsdp": True, "fsdp_config": layers | {"transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"]}}
    with TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder, num_train_epochs=1, per_device_train_batch_size=4, max_grad_norm=1.0, lr_scheduler_type="linear",
            save_strategy="no", report_to=[], train_sampling_strategy="sequential", **options,
        )  # fmt: skip
        rows = [{"input_ids": row, "labels": row} for row in data]
        fitted = trainer(model, arguments, train_dataset=rows)
        fitted.train()
    return fitted.model_wrapped


if __name__ == "__main__":
    torch.manual_seed(0)
    # Without these two several processes on a CPU would train a model each.
    options = {} if torch.cuda.is_available() else {"use_cpu": True, "ddp_backend": "gloo"}
    train(small(), torch.randint(32, (32, 16)), *sys.argv[1:], **options)
