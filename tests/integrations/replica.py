"""One of two processes of test_trainer.py: trains routers with transformers' Trainer."""

import gc
import json
import sys
from pathlib import Path

import datasets
from test_trainer import DEMO, demo_model, settings
from transformers import DataCollatorForSeq2Seq, Trainer, TrainingArguments

from megaskip import RouterConfig
from megaskip.data.tokenizer import load_tokenizer
from megaskip.integrations import route_tune


def train(folder: Path) -> None:
    """Train on the rows in `folder`, and log there."""
    tokenizer = load_tokenizer(DEMO / "backbone")
    trainer = Trainer(
        model=demo_model(),
        args=TrainingArguments(**settings(folder, gradient_accumulation_steps=1)),
        train_dataset=datasets.load_from_disk(str(folder / "rows")),
        data_collator=DataCollatorForSeq2Seq(tokenizer, padding=True),
        processing_class=tokenizer,
    )
    route_tune(trainer, RouterConfig())
    trainer.train()
    if trainer.args.process_index == 0:
        (folder / "log.json").write_text(json.dumps(trainer.state.log_history))
    trainer.accelerator.end_training()


train(Path(sys.argv[1]))
# DistributedDataParallel holds threads of gloo, which abort a process that ends before them.
gc.collect()
