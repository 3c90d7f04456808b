"""The file of `serve --config`: how the OP-TEE of this process is built, beyond its board."""

from dataclasses import replace
from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from mediator.documents import load_document, read_document
from optee.config import Config
from optee.storage.options import StorageOptions


def _options(options: dict[str, str | int]) -> dict[str, str | int]:
    StorageOptions.parse(options)
    return options


class ServeDocument(BaseModel):
    """The document as it stands in a file."""

    model_config = ConfigDict(extra="forbid", strict=True)

    core_heap: Annotated[int, Field(ge=1 << 14, le=1 << 30)] | None = None
    """CFG_CORE_HEAP_SIZE in bytes."""
    storage: Annotated[dict[str, str | int], AfterValidator(_options)] = {}
    """`memory: optee` or `managed`, and the sizes of the memory manager."""

    def over(self, config: Config) -> Config:
        """A configuration with what stands here."""
        heap = config.core_heap_size if self.core_heap is None else self.core_heap
        return replace(config, core_heap_size=heap, storage=StorageOptions.parse(self.storage))


def load_config(path: Path) -> ServeDocument:
    """Read such a file. Raises DocumentError, with file:line:column for each thing that is wrong."""
    return load_document(ServeDocument, read_document(path), str(path))
