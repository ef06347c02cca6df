"""From a folder with GGUF files to a `Checkpoint`: metadata of the first shard, tensors of all."""

from hfvram.errors import HfvramError, printable
from hfvram.read.checkpoint import Checkpoint
from hfvram.read.folder import Folder
from hfvram.read.gguf_files import pick, projectors
from hfvram.units import gib

SPLIT = "split.count"


def read_model(folder: Folder, file: str | None) -> Checkpoint:
    """The model that `file` picks among a folder's GGUF files, or the only one.

    Raises `usage`, `no_config`, `bad_header`, `missing_extra`, and what the folder's source raises.
    """
    shards = (file,) if file in projectors(folder.files) else pick(folder.files, file, folder.id)
    others = [p for p in projectors(folder.files) if p not in shards]
    towers = [p for p in others if "F16" in p.upper().replace("BF16", "")][:1] or others[:1]
    headers = folder.read_gguf([*shards, *towers])
    projector = headers.pop().tensors if towers else ()
    metadata = headers[0].metadata
    if (count := metadata.get(SPLIT, len(shards))) not in (0, len(shards)):
        first = printable(shards[0], 100)
        raise HfvramError(
            "no_config", f"{first} of {folder.id} says that it is one of {count}, of which {len(shards)} are here"
        )
    warnings = []
    if towers:
        size = sum(t.nbytes for t in projector)
        warnings.append(
            f"{printable(towers[0], 100)}, for images or sound, takes {gib(size)} more where it is loaded (--mmproj)"
        )
    return Checkpoint(
        id=folder.id,
        source=folder.source,
        config={},
        commit=folder.commit,
        tensors=tuple(t for h in headers for t in h.tensors),
        gguf=metadata,
        projector=projector,
        path=folder.path,
        warnings=tuple(warnings),
    )
