"""The demo: a Griffin that writes in the manner of Shakespeare's plays after a few minutes on two CPU cores.

    griffin train recipes/shakespeare.py --run runs/shakespeare

Two recurrent layers and one of local attention, built like RecurrentGemma, so that transformers opens the result. At
this size and time a wider and shallower model learns more per minute than a deeper one, and a vocabulary of 2,048
keeps the output matrix, which costs as much as the layers, small.
"""

from pathlib import Path

from griffin.config import GriffinConfig
from griffin.train.config import TrainConfig


def config() -> TrainConfig:
    return TrainConfig(
        model=GriffinConfig(
            vocab_size=2048,
            width=256,
            mlp_width=768,
            lru_width=256,
            num_heads=4,
            num_gate_blocks=4,
            block_types=("recurrent", "recurrent", "attention"),
            window=128,
        ),
        train_data=str(Path(__file__).parent / "data" / "shakespeare.txt.xz"),
        tokenizer="bpe:2048",
        batch_rows=8,
        row_tokens=128,
        steps=1200,
        learning_rate=4e-3,
        min_learning_rate=0.05,
        validate_every=200,
        validation_rows=128,
        checkpoint_every=200,
        sample_prompt="ROMEO.\n",
        threads=2,
    )
