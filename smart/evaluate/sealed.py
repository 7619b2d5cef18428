"""Tables that are read back: Parquet with checksums of its pages, and a digest of the table in its metadata.

Pages have checksums of their own (CRC-32), so that damaged bytes are found before they are decoded. The digest covers
what those leave out: names, types, missing values and the metadata, which stand in the file's footer.
"""

import hashlib
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from smart.files import write_atomically

DIGEST = b"sha256"


class Damaged(ValueError):
    """A table that cannot be read, or that differs from what was written."""


def write_table(path: Path, table: pa.Table, **options: Any) -> None:
    """Write ``table`` to ``path`` in one rename, with its digest; ``options`` go to ``pyarrow.parquet``."""
    kept = {**(table.schema.metadata or {}), DIGEST: _digest(table).encode()}
    sealed = table.replace_schema_metadata(kept)
    write_atomically(path, lambda file: pq.write_table(sealed, file, write_page_checksum=True, **options))


def read_table(path: Path, *, sealed: bool = True) -> pa.Table:
    """The table in ``path``, without its digest. Raises ``Damaged`` if it differs from what was written.

    ``sealed``: a table without a digest, as other programs and older versions write it, counts as damaged.
    """
    try:
        table = pq.read_table(path, page_checksum_verification=True)
        kept = dict(table.schema.metadata or {})
        digest = kept.pop(DIGEST, None)
        table = table.replace_schema_metadata(kept or None)
        if digest is None and sealed:
            raise Damaged("it has no checksum")
        if digest is not None and digest != _digest(table).encode():
            raise Damaged("its checksum is not the recorded one")
    except Damaged:
        raise
    except (OSError, pa.ArrowException, ValueError, KeyError, MemoryError, OverflowError) as error:
        raise Damaged(str(error).splitlines()[0][:200] if str(error) else type(error).__name__) from None
    return table


def _digest(table: pa.Table) -> str:
    """SHA-256 of the metadata, names, types and values of a table, however it is divided into pages."""
    found = hashlib.sha256()
    for key, text in sorted((table.schema.metadata or {}).items()):
        if key != DIGEST:
            found.update(b"%s\0%s\0" % (key, text))
    for name in table.column_names:
        found.update(f"{name}\0{table.num_rows}\0".encode())
        chunks = table[name].chunks
        _add(found, pa.concat_arrays(chunks) if chunks else pa.array([], table[name].type))
    return found.hexdigest()


def _add(found: Any, values: pa.Array) -> None:
    found.update(values.is_valid().to_numpy(zero_copy_only=False).tobytes())
    if pa.types.is_list(values.type):  # the name of a list's elements is not the same after reading
        found.update(pc.list_value_length(values).fill_null(0).to_numpy(zero_copy_only=False).tobytes())
        _add(found, values.flatten())
        return
    found.update(str(values.type).encode())
    known = values.drop_null()
    if pa.types.is_string(values.type):
        found.update(pc.binary_length(known).to_numpy(zero_copy_only=False).tobytes())
        found.update("".join(known.to_pylist()).encode())
    else:
        found.update(known.to_numpy(zero_copy_only=False).tobytes())
