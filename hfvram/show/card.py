"""A card's figures as a section of a README: Markdown, with nothing in it that changes from day to day."""

import shlex

from hfvram.answer.card import Card, Holds, Training
from hfvram.show.layout import size
from hfvram.show.markdown import cell, table
from hfvram.show.section import END, START
from hfvram.units import short_count


def section(card: Card) -> str:
    """The section between its markers; lines end in `\\n`, the last in nothing."""
    parts = [START, "## GPU memory", *_memory(card), *_holds(card), *_training(card), *_how(card), END]
    return "\n\n".join(parts)


def _memory(card: Card) -> list[str]:
    active = f", {short_count(card.active_parameters)} active" if card.active_parameters != card.parameters else ""
    words = "one sequence, prompt and answer together" if card.cached else "one sequence"
    heading = ("loaded as", *(f"{n:,} tokens" for n in card.contexts))
    rows = [(m.numbers, *map(size, m.device_bytes)) for m in card.memory]
    return [
        f"What {_code(card.id)} ({short_count(card.parameters)} parameters{active}) takes of a GPU in inference with "
        f"transformers, as `nvidia-smi` shows it; {words}:",
        table(heading, rows, "<" + ">" * len(card.contexts)),
    ]


def _holds(card: Card) -> list[str]:
    """What common GPUs hold; a sentence alone where none of them holds anything."""
    if not any(n for h in card.holds for n in h.contexts):
        largest = card.holds[-1]
        return [f"No single GPU up to {largest.gpu} ({size(largest.memory_bytes)}) holds it."]
    words = "Longest sequence that fits" if card.exactly else "Longest sequence of these that fits"
    most = f"up to {card.longest:,} tokens"
    limit = f"the model is made for {most}" if card.limit else f"{most} were tried"
    rows = [(_gpus(h), _capacity(h), *map(_tokens, h.contexts)) for h in card.holds]
    heading = ("GPU", "its memory", *(m.numbers for m in card.memory))
    return [f"{words} ({limit}):", table(heading, rows, "<>" + ">" * len(card.memory))]


def _gpus(h: Holds) -> str:
    name = f"{h.gpus} × {h.gpu}, tensor parallel" if h.gpus > 1 else h.gpu
    return f"{name}, and larger" if h.and_larger else name


def _capacity(h: Holds) -> str:
    return f"{size(h.memory_bytes)} each" if h.gpus > 1 else size(h.memory_bytes)


def _tokens(count: int | None) -> str:
    return "not answered" if count is None else f"{count:,} tokens" if count else "does not fit"


def _training(card: Card) -> list[str]:
    if not card.training:
        return []
    rows = [(t.name, size(t.device_bytes), _runs_on(t), f"`{_command(card, t.options)}`") for t in card.training]
    return [
        f"Fine-tuning with one sequence of {card.trained_ctx:,} tokens at a time, AdamW and gradient checkpointing:",
        table(("", "memory", "smallest GPU", "command"), rows, "<><<"),
    ]


def _runs_on(t: Training) -> str:
    if t.gpu is None:
        return "more than 8 × H200"
    return f"{t.gpus} × {t.gpu}, FSDP" if t.gpus > 1 else t.gpu


def _how(card: Card) -> list[str]:
    modelled = " and ".join(f"{name} {v.partition('+')[0]}" for name, v in card.versions.items() if name != "hfvram")
    way = "by formula, " if card.method == "formula" else "by the model's own code on the meta device, "
    example = _command(card, f"--ctx {card.contexts[-1]} --explain")
    said = (
        f"How it was computed: hfvram {card.versions['hfvram']} (`pip install hfvram`), {way}from the configuration "
        f"and the sizes of the weights, as {modelled} run them: weights, cache and the most that is live at once, then "
        f"what PyTorch's allocator and the CUDA context hold beyond that. How far off it may be: {cell(card.basis)}. "
        f"`{example}` shows every item."
    )
    notes = [f"- {cell(note)}" for note in card.notes]
    return [said, f"Notes, of {card.contexts[0]:,} tokens as stored:", "\n".join(notes)] if notes else [said]


def _command(card: Card, options: str) -> str:
    return f"hfvram {shlex.quote(_plain(card.id))} {options}"


def _code(text: str) -> str:
    return f"`{_plain(text)}`"


def _plain(text: str) -> str:
    """A name that ends no code and starts no comment."""
    return cell(text).replace("`", "'")
