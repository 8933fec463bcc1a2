"""Tokenizers with the chat templates of well-known families, written out: how they differ is what rendering must survive."""

from __future__ import annotations

from typing import Any, NamedTuple

from crosstrain.testing import tiny_tokenizer

SMOLLM2 = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}{{ '<|im_start|>system\n"
    "You are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n' }}{% endif %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAMA3 = (
    "{{ bos_token }}{% for m in messages %}{{ '<|start_header_id|>' + m['role'] + '<|end_header_id|>\n\n' + m['content'] | trim "
    "+ '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
MISTRAL = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'assistant' %}{{ ' ' + m['content'] + eos_token }}"
    "{% else %}{{ '[INST] ' + m['content'] + ' [/INST]' }}{% endif %}{% endfor %}"
)
GEMMA = (
    "{{ bos_token }}{% for m in messages %}"
    "{% if m['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{{ '<start_of_turn>' + ('model' if m['role'] == 'assistant' else m['role']) + '\n' "
    "+ m['content'] | trim + '<end_of_turn>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)
THINKING = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}"
    "{% if m['role'] == 'assistant' and loop.last and '</think>' not in m['content'] %}{{ '<think>\n\n</think>\n\n' }}{% endif %}"
    "{{ m['content'] }}"
    "{% for call in m['tool_calls'] or [] %}{{ '\n<tool_call>' + call['function']['name'] + '</tool_call>' }}{% endfor %}"
    "{{ '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


class Family(NamedTuple):
    """A template, its end-of-turn token, its other special tokens, whether it trims what messages say, what leads an answer."""

    template: str
    end: str
    special: tuple[str, ...] = ()
    trims: bool = False
    lead: str = ""

    def answer(self, text: str) -> str:
        """What is trained of an answer."""
        return self.lead + (text.strip() if self.trims else text) + self.end


FAMILIES = {
    "smollm2": Family(SMOLLM2, "<|im_end|>", ("<|im_start|>",)),
    "llama3": Family(LLAMA3, "<|eot_id|>", ("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>"), trims=True),
    "mistral": Family(MISTRAL, "</s>", ("<s>", "[INST]", "[/INST]"), lead=" "),
    "gemma": Family(GEMMA, "<end_of_turn>", ("<bos>", "<start_of_turn>"), trims=True),
    "thinking": Family(THINKING, "<|im_end|>", ("<|im_start|>",)),
}


def tokenizer_of(name: str) -> Any:
    """A byte-level tokenizer with the family's special tokens and template; padding is the end token."""
    family = FAMILIES[name]
    tokenizer = tiny_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": [*family.special, family.end]})
    tokenizer.add_tokens(["<tool_call>", "</tool_call>", "<think>", "</think>"])  # added, and not special: as Qwen has them
    tokenizer.eos_token = tokenizer.pad_token = family.end
    if family.special[0] in ("<|begin_of_text|>", "<s>", "<bos>"):
        tokenizer.bos_token = family.special[0]
    tokenizer.chat_template = family.template
    return tokenizer
