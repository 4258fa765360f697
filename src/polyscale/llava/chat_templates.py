"""Chat templates of the VILA models, as their conversation modes put a prompt together."""

import json
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from ..utils.validation import check_choice


@dataclass(frozen=True)
class Conversation:
    """What stands around the messages of a conversation.

    Args:
        system: (before, text, after) of the system message, with the text that is used where there is none.
        user: (before, after) of a user's message.
        assistant: (before, after) of an answer.
        stop: tokens that end an answer.
    """

    system: tuple[str, str, str]
    user: tuple[str, str]
    assistant: tuple[str, str]
    stop: tuple[str, ...]


def _header(role: str) -> str:
    return f"<|start_header_id|>{role}<|end_header_id|>\n\n"


CONVERSATIONS = {
    "vicuna_v1": Conversation(
        system=(
            "",
            "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, "
            "detailed, and polite answers to the user's questions.",
            " ",
        ),
        user=("USER: ", " "),
        assistant=("ASSISTANT: ", "</s>"),
        stop=("</s>",),
    ),
    "llama_3": Conversation(
        system=(
            f"<|begin_of_text|>{_header('system')}",
            "You are a helpful language and vision assistant. You are able to understand the visual content that the "
            "user provides, and assist the user with a variety of tasks using natural language.",
            "<|eot_id|>",
        ),
        user=(_header("user"), "<|eot_id|>"),
        assistant=(_header("assistant"), "<|eot_id|>"),
        stop=("<|eot_id|>", "<|end_of_text|>"),
    ),
    "hermes-2": Conversation(
        system=("<|im_start|>system\n", "Answer the questions.", "<|im_end|>"),
        user=("<|im_start|>user\n", "<|im_end|>"),
        assistant=("<|im_start|>assistant\n", "<|im_end|>"),
        stop=("<|im_end|>",),
    ),
    "qwen2": Conversation(
        system=("<|im_start|>system\n", "You are a helpful assistant", "<|im_end|>\n"),
        user=("<|im_start|>user\n", "<|im_end|>\n"),
        assistant=("<|im_start|>assistant\n", "<|im_end|>\n"),
        stop=("<|im_end|>",),
    ),
}
# The template that the tokenizer brings, with images in it.
OF_TOKENIZER = "tokenizer"


def conversation_for(tokenizer: PreTrainedTokenizerBase, own_template: bool) -> str:
    """The conversation mode that fits a tokenizer.

    Args:
        tokenizer: of the language model.
        own_template: whether the template that it brings goes before all others.
    """
    if own_template and tokenizer.chat_template:
        return OF_TOKENIZER
    vocabulary = tokenizer.get_vocab()
    if "<|start_header_id|>" in vocabulary:
        return "llama_3"
    return "hermes-2" if "<|im_start|>" in vocabulary else "vicuna_v1"


def chat_template(name: str, tokenizer: PreTrainedTokenizerBase, image: str) -> str:
    """The Jinja template of a conversation mode, for messages that hold texts and images.

    Args:
        name: one of `CONVERSATIONS`, or "tokenizer".
        tokenizer: of the language model.
        image: what stands for an image in the text.

    Raises:
        ValueError: for another name, or a tokenizer without a template.
    """
    check_choice("conversation", name, (*CONVERSATIONS, OF_TOKENIZER))
    if name != OF_TOKENIZER:
        return _flattened(image) + _template(CONVERSATIONS[name])
    if not isinstance(tokenizer.chat_template, str):
        raise ValueError(
            f"`conversation` {name!r} needs a tokenizer with a chat template: give one of {', '.join(CONVERSATIONS)}."
        )
    return _flattened(image) + tokenizer.chat_template


def stop_tokens(name: str) -> tuple[str, ...]:
    """The tokens that end an answer in a conversation mode, the end of the text aside."""
    return CONVERSATIONS[name].stop if name in CONVERSATIONS else ("<|im_end|>", "<|eot_id|>")


def _flattened(image: str) -> str:
    """Makes the content of every message a text."""
    return (
        "{% set flat = namespace(messages=[], text='') %}"
        "{% for message in messages %}"
        "{% set flat.text = '' %}"
        "{% if message['content'] is string %}{% set flat.text = message['content'] %}"
        "{% elif message['content'] %}{% for part in message['content'] %}"
        f"{{% if part['type'] == 'image' %}}{{% set flat.text = flat.text + {json.dumps(image)} %}}"
        "{% elif part['type'] == 'text' %}{% set flat.text = flat.text + part['text'] %}{% endif %}"
        "{% endfor %}{% endif %}"
        "{% set flat.messages = flat.messages + [dict(message, content=flat.text)] %}"
        "{% endfor %}"
        "{% set messages = flat.messages %}"
    )


def _template(conversation: Conversation) -> str:
    def text(value: str) -> str:
        return f"{{{{ {json.dumps(value)} }}}}"

    before, system, after = conversation.system
    user, assistant = conversation.user, conversation.assistant
    return (
        f"{text(before)}"
        "{% if messages and messages[0]['role'] == 'system' %}{{ messages[0]['content'] }}"
        f"{{% else %}}{text(system)}{{% endif %}}{text(after)}"
        "{% for message in messages %}"
        f"{{% if message['role'] == 'user' %}}{text(user[0])}{{{{ message['content'] }}}}{text(user[1])}"
        f"{{% elif message['role'] == 'assistant' %}}{text(assistant[0])}{{{{ message['content'] }}}}"
        f"{text(assistant[1])}{{% endif %}}"
        "{% endfor %}"
        f"{{% if add_generation_prompt %}}{text(assistant[0].rstrip(' '))}{{% endif %}}"
    )


__all__ = ["CONVERSATIONS", "OF_TOKENIZER", "Conversation", "chat_template", "conversation_for", "stop_tokens"]
