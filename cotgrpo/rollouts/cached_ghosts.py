"""Cached ghosts: a teacher's likeliest tokens, kept in Parquet, for training without the teacher.

`cotgrpo generate --top_logprobs K` writes them for the teacher's own replies, as pieces of text, and with `score_for`
for replies of a student, as the student's own token ids. A training row finds its entry by its texts. A context has the
teacher's distribution if a token of the teacher begins at the same byte of the same text. All others learn from the
row's text alone.
"""

from __future__ import annotations

import dataclasses
import json
import zlib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np

from cotgrpo.atomic_files import whole_file
from cotgrpo.data.sources import DataError
from cotgrpo.data.template import Example
from cotgrpo.data.triples import Triple
from cotgrpo.objectives import MASKED_LOGIT
from cotgrpo.teacher_servers.vocabulary import Vocabulary, first_difference
from cotgrpo.types import GhostBatch, SftBatch

if TYPE_CHECKING:
    import pyarrow as pa

ABOUT = b"cotgrpo.ghosts"
"""The key of the file's own description in its metadata."""
COMPARED = 200
"""Replies whose tokens are compared with the student's tokenizer."""
LEAST_SAME = 0.5
"""Share of them that must be cut as the student's tokenizer cuts them. Sampled replies may differ here and there."""

Key = tuple[str, str, str]
"""Question, rationale and answer of a row."""


@dataclasses.dataclass(frozen=True)
class CachedReply:
    """The teacher's likeliest tokens at the tokens of one reply: as pieces of text, or as ids of the student.

    Attributes:
        key: the row's texts.
        pieces: the teacher's own tokens; empty with `ids`.
        top_pieces: at each of them, the likeliest tokens.
        ids: the student's whole sequence, in a cache that was made for it; empty with `pieces`.
        top_ids: at each of its last tokens, the likeliest tokens.
        top_log_probs: their log-probabilities, the likeliest first.
    """

    key: Key
    top_log_probs: Sequence[Sequence[float]]
    pieces: Sequence[bytes] = ()
    top_pieces: Sequence[Sequence[bytes]] = ()
    ids: Sequence[int] = ()
    top_ids: Sequence[Sequence[int]] = ()


@dataclasses.dataclass(frozen=True)
class Cache:
    """What a cache holds.

    Attributes:
        path: the file, for messages.
        top_logprobs: how many tokens there are at each place.
        tokenizer: the fingerprint of the student's tokenizer, in a cache of ids; else empty.
        replies: by the row's texts.
        crc: of the file, by which a run that resumes knows it again.
    """

    path: Path
    top_logprobs: int
    tokenizer: Mapping[str, str]
    replies: dict[Key, CachedReply]
    crc: int = 0


def bytes_of(piece: str | Sequence[int]) -> bytes:
    """Return a piece of `TeacherReply.logprobs` as bytes."""
    return piece.encode("utf-8", "replace") if isinstance(piece, str) else bytes(piece)


def cached_reply(key: Key, logprobs: Sequence[Any]) -> CachedReply:
    """Return an entry of a teacher's own reply, from `TeacherReply.logprobs`."""
    best_first = [sorted(top, key=lambda pair: -pair[1]) for _, top in logprobs]
    return CachedReply(
        key,
        pieces=[bytes_of(piece) for piece, _ in logprobs],
        top_pieces=[[bytes_of(piece) for piece, _ in top] for top in best_first],
        top_log_probs=[[float(value) for _, value in top] for top in best_first],
    )


def schema(about: Mapping[str, Any]) -> pa.Schema:
    """Return the columns of the file."""
    import pyarrow as pa

    lists = lambda kind: pa.list_(pa.list_(kind))
    columns = {
        "question": pa.string(),
        "rationale": pa.string(),
        "answer": pa.string(),
        "pieces": pa.list_(pa.binary()),
        "top_pieces": lists(pa.binary()),
        "ids": pa.list_(pa.int32()),
        "top_ids": lists(pa.int32()),
        "top_log_probs": lists(pa.float32()),
    }
    return pa.schema(list(columns.items()), metadata={ABOUT: json.dumps(about).encode()})


def write_cache(
    path: Path, replies: Iterable[CachedReply], top_logprobs: int, tokenizer: Mapping[str, str] | None = None
) -> None:
    """Write a cache, atomically. `tokenizer` is the student's fingerprint, for a cache of ids."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    fields = ("pieces", "top_pieces", "ids", "top_ids", "top_log_probs")
    rows = [
        dict(zip(("question", "rationale", "answer"), reply.key, strict=True))
        | {name: [list(x) if isinstance(x, tuple | list) else x for x in getattr(reply, name)] for name in fields}
        for reply in replies
    ]
    about = {"top_logprobs": top_logprobs, "tokenizer": dict(tokenizer or {})}
    with whole_file(path) as temporary:
        pq.write_table(pa.Table.from_pylist(rows, schema=schema(about)), temporary)


def read_cache(path: str | Path) -> Cache:
    """Read a cache.

    Raises:
        DataError: a file that is missing, broken, or not a cache.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    path = Path(path)
    if not path.is_file():
        raise DataError(
            f"{path}: no such file of cached ghosts (grpo.ghosts.path). generate --top_logprobs writes one."
        )
    try:
        table = pq.read_table(path)
        about = json.loads((table.schema.metadata or {}).get(ABOUT, b"null"))
        rows = table.to_pylist()
    except (pa.ArrowException, OSError, ValueError) as error:
        raise DataError(
            f"{path} cannot be read ({' '.join(str(error).split())[:200]}): it is not Parquet, or not whole. Make it "
            "again with generate --top_logprobs."
        ) from None
    if not isinstance(about, dict) or not {*schema({}).names} <= {*table.column_names}:
        raise DataError(
            f"{path} holds no cached ghosts: expected a ghosts.parquet that generate --top_logprobs has written."
        )
    replies: dict[Key, CachedReply] = {}
    for number, row in enumerate(rows, 1):
        key = (row.pop("question"), row.pop("rationale"), row.pop("answer"))
        reply = CachedReply(key, **{name: row[name] or () for name in row})
        check_entry(reply, f"{path}: row {number}")
        replies.setdefault(key, reply)
    return Cache(path, int(about["top_logprobs"]), about["tokenizer"], replies, zlib.crc32(path.read_bytes()))


def check_entry(reply: CachedReply, place: str) -> None:
    """Raise DataError unless the lists of an entry fit each other and hold log-probabilities."""
    tops: Sequence[Sequence[object]] = reply.top_pieces or reply.top_ids
    count = len(reply.pieces) if reply.pieces else len(reply.top_ids)
    if not count or not (len(tops) == len(reply.top_log_probs) == count) or len(reply.ids) < len(reply.top_ids):
        raise DataError(f"{place} has no log-probabilities, or not at each token. Make the file again.")
    for top, values in zip(tops, reply.top_log_probs, strict=True):
        if len(top) != len(values) or not all(value <= 0.01 for value in values):  # NaN is not
            raise DataError(f"{place} has a list with a wrong length or log-probability. Make the file again.")


class Aligned(NamedTuple):
    """The teacher's distribution at each target of a sequence, `[T, K]`, and where there is one, `[T]`."""

    ids: np.ndarray
    log_probs: np.ndarray
    known: np.ndarray


def aligned(example: Example, triple: Triple, reply: CachedReply | None, vocabulary: Vocabulary, top_k: int) -> Aligned:
    """Return what is known of the teacher at each target of a row's sequence.

    Where nothing is known, the text's own token has all of the probability.

    Args:
        example: the row's sequence; target t is its token t + 1.
        triple: the row.
        reply: its entry, or None.
        vocabulary: the student's.
        top_k: columns, at most those of the cache.
    """
    targets = np.asarray(example.tokens[1:], np.int32)
    ids = np.repeat(targets[:, None], top_k, axis=1)
    log_probs = np.where(np.arange(top_k) == 0, 0.0, MASKED_LOGIT).astype(np.float32)[None].repeat(len(targets), 0)
    known = np.zeros(len(targets), bool)
    for target, top in () if reply is None else places(example, triple, reply, vocabulary):
        if not top or top[0][0] is None:  # a token that the student does not have
            continue
        known[target], log_probs[target] = True, MASKED_LOGIT
        listed = ((i, value) for i, value in top[:top_k] if i is not None and value > MASKED_LOGIT / 2)
        for k, (token, value) in enumerate(listed):
            ids[target, k], log_probs[target, k] = token, min(value, 0.0)
    return Aligned(ids, log_probs, known)


def places(
    example: Example, triple: Triple, reply: CachedReply, vocabulary: Vocabulary
) -> Iterable[tuple[int, list[tuple[int | None, float]]]]:
    """Yield targets of a sequence with the teacher's likeliest tokens there."""
    tokens = [int(i) for i in example.tokens]
    if reply.ids:
        first = len(tokens) - len(reply.top_ids)
        for place, (ids, values) in enumerate(zip(reply.top_ids, reply.top_log_probs, strict=True), first):
            yield place - 1, list(zip(ids, values, strict=True))
        return
    starts = {offset: n for n, offset in enumerate(offsets(reply.pieces))}
    own = vocabulary.pieces(tokens)
    there, here = b"".join(reply.pieces), b"".join(own)
    shifts = shared_parts(there, here, offsets(own)[example.prompt_length], triple)
    for target, offset in enumerate(offsets(own)[1:]):
        for begin, end, shift in shifts:
            n = starts.get(offset + shift) if begin <= offset < end else None
            if n is not None:
                top = [vocabulary.id_of_bytes(piece) for piece in reply.top_pieces[n]]
                yield target, list(zip(top, reply.top_log_probs[n], strict=True))


def offsets(pieces: Sequence[bytes]) -> list[int]:
    """Return the place of each piece in the bytes of all of them."""
    ends = np.cumsum([0, *map(len, pieces)])
    return [int(end) for end in ends[:-1]]


def shared_parts(there: bytes, here: bytes, start: int, triple: Triple) -> list[tuple[int, int, int]]:
    """Return where rationale and answer of a row are in its sequence, as (begin, end, shift to the teacher's reply)."""
    found: list[tuple[int, int, int]] = []
    after_here, after_there = start, 0
    for text in (triple.rationale.encode(), triple.answer.encode()):
        begin, origin = here.find(text, after_here), there.find(text, after_there)
        if text and begin >= 0 and origin >= 0:
            found.append((begin, begin + len(text), origin - begin))
            after_here, after_there = begin + len(text), origin + len(text)
    return found


def check_tokenizer(cache: Cache, vocabulary: Vocabulary, fingerprint: Mapping[str, str]) -> None:
    """Raise DataError unless the cache's tokens are the student's.

    A cache of ids names its tokenizer. One of pieces must cut most of its texts as the student's tokenizer does.
    """
    fix = "Take the cache of a teacher with the student's tokenizer, or make one for this student."
    if cache.tokenizer:
        if dict(cache.tokenizer) != dict(fingerprint):
            raise DataError(f"{cache.path} was made for a student with another tokenizer. {fix}")
        return
    compared = [reply for reply in list(cache.replies.values())[:COMPARED] if reply.pieces]
    different: list[str] = []
    for reply in compared:
        text = b"".join(reply.pieces).decode("utf-8", "replace")
        theirs = [piece.decode("utf-8", "replace") for piece in reply.pieces]
        own = vocabulary.encode(text)
        if [piece.decode("utf-8", "replace") for piece in vocabulary.pieces(own)] != theirs:
            words = first_difference(vocabulary, own, theirs) or "the tokens differ"
            different.append(f"in {text!r:.60}, {words.replace('server', 'cache')}")
    if compared and len(different) > (1 - LEAST_SAME) * len(compared):
        raise DataError(
            f"{cache.path} is of a teacher with another tokenizer than the student: {len(different)} of "
            f"{len(compared)} replies have other tokens; {different[0]}. {fix}"
        )


@dataclasses.dataclass
class CacheReport:
    """What a cache gave to the training rows.

    Attributes:
        rows: the rows; with_entry: those that have an entry.
        targets: supervised tokens; known: those with the teacher's distribution.
    """

    rows: int = 0
    with_entry: int = 0
    targets: int = 0
    known: int = 0

    def __str__(self) -> str:
        share = 100 * self.known / max(self.targets, 1)
        return (
            f"{self.with_entry} of {self.rows} rows have cached ghosts; {self.known} of {self.targets} supervised "
            f"tokens ({share:.1f} %) have the teacher's distribution, the others learn from the text"
        )


def with_cached_ghosts(
    examples: Sequence[Example],
    triples: Sequence[Triple],
    cache: Cache,
    vocabulary: Vocabulary,
    *,
    top_k: int,
    choice: Literal["argmax", "text"],
    missing: Literal["error", "text"],
) -> tuple[list[Example], CacheReport]:
    """Return examples with the arrays of their targets: `ghost_tokens`, `top_ids` and `top_log_probs`.

    Args:
        examples: the training rows' sequences.
        triples: the training rows.
        cache: the teacher's likeliest tokens.
        vocabulary: the student's.
        top_k: how many of them the objective reads; 0: none.
        choice: argmax: the ghost token is the teacher's likeliest, where it is known. text: it is the row's own.
        missing: what to do with a row without an entry.

    Raises:
        DataError: too few tokens in the cache, a row without an entry, or no row with one.
    """
    if top_k > cache.top_logprobs:
        raise DataError(
            f"{cache.path} has {cache.top_logprobs} log-probabilities at each token, and the objective reads {top_k}. "
            f"Lower grpo.objective.top_k, or make the cache with generate --top_logprobs {top_k}."
        )
    by_source = {triple.source: triple for triple in triples}
    report, found = CacheReport(), []
    for example in examples:
        triple = by_source[example.source]
        reply = cache.replies.get((triple.question, triple.rationale, triple.answer))
        if reply is not None and reply.ids and list(reply.ids) != [int(token) for token in example.tokens]:
            reply = None  # made for another template
        if reply is None and missing == "error":
            raise DataError(
                f"{example.source}: the row has no entry in {cache.path} for its tokens; the file has "
                f"{len(cache.replies)}. Train on the rows that the same generate command wrote, with the template that "
                "they were scored for, or set grpo.ghosts.missing text."
            )
        at = aligned(example, triple, reply, vocabulary, max(top_k, 1))
        supervised = example.supervised[1:]
        report.rows, report.with_entry = report.rows + 1, report.with_entry + (reply is not None)
        report.targets, report.known = (
            report.targets + int(supervised.sum()),
            report.known + int(at.known[supervised].sum()),
        )
        ghosts = at.ids[:, 0] if choice == "argmax" else np.asarray(example.tokens[1:], np.int32)
        extra = {"ghost_tokens": ghosts} | ({"top_ids": at.ids, "top_log_probs": at.log_probs} if top_k else {})
        found.append(dataclasses.replace(example, extra=extra))
    if not report.known:
        raise DataError(f"{cache.path} has nothing for these rows: {report}.")
    return found, report


class CachedBatches:
    """Packed batches of text whose ghosts come from a cache.

    Args:
        batches: from `make_batches`, of examples of `with_cached_ghosts`.
        cache: where the ghosts come from.
    """

    def __init__(self, batches: Any, cache: Cache) -> None:
        self.batches, self.cache = batches, cache

    def __next__(self) -> GhostBatch:
        batch: SftBatch = next(self.batches)
        extra = dict(batch.extra)
        ghosts = extra.pop("ghost_tokens")
        return GhostBatch.teacher_forced(batch).replace(ghost_tokens=ghosts, extra=extra)

    def get_state(self) -> dict[str, Any]:
        """Return the position, and what the file is known by."""
        return {"batches": self.batches.get_state(), "crc": self.cache.crc}

    def set_state(self, state: dict[str, Any]) -> None:
        """Restore the position. Raises DataError if the file has changed."""
        if state["crc"] != self.cache.crc:
            raise DataError(
                f"{self.cache.path} has changed since the run was stopped, which would be another run. Put the file "
                "back, or choose another run_dir."
            )
        self.batches.set_state(state["batches"])
