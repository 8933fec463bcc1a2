"""Data: files to rows, rows to tokenized examples, examples to seekable streams."""

from crosstrain.data.chat import encode, template_hash
from crosstrain.data.rows import BadRows, Row, data_hash, read_rows
from crosstrain.data.streams import Stream

__all__ = ["BadRows", "Row", "Stream", "data_hash", "encode", "read_rows", "template_hash"]
