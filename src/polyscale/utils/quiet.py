"""Silences warnings of other libraries about each other, which a user can do nothing about. Importing it is enough."""

import logging


def _is_of_use(record: logging.LogRecord) -> bool:
    # torchao registers its enums in a way that newer versions of torch no longer need.
    return "register_constant() on Enum" not in record.getMessage()


logging.getLogger("torch.utils._pytree").addFilter(_is_of_use)
