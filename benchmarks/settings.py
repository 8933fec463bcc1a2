"""What both sides share. Standard library only, since peers import it too."""

BATCH = {"sft": 16, "documents": 4, "dpo": 16, "grpo": 8}
"""Examples of an optimizer step; of GRPO, prompts."""

GENERATIONS = 8
NEW_TOKENS = 64
LEARNING_RATE = 1e-5
BETA = 0.1
