"""Silences warnings of other libraries about each other, which a user can do nothing about. Importing it is enough."""

import logging


# Parts of messages that nobody who uses this library needs.
_OF_NO_USE = (
    "register_constant() on Enum",  # torchao registers its enums in a way that newer versions of torch do not need
    "Skipping import of cpp extensions",  # torchao has kernels for a newer torch only; int8 weights need none of them
)


def _is_of_use(record: logging.LogRecord) -> bool:
    return not any(text in record.getMessage() for text in _OF_NO_USE)


for _name in ("torch.utils._pytree", "torchao"):
    logging.getLogger(_name).addFilter(_is_of_use)

__all__: list[str] = []
