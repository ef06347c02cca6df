"""The page itself: a form, what it is answered, and how one follows from the other."""

from collections.abc import AsyncGenerator
from contextlib import aclosing
from pathlib import Path
from typing import Any, Final

from hfvram.answer.estimate import Estimate
from hfvram.answer.gpus import gpus
from hfvram.errors import HfvramError
from hfvram.request import CHOICES
from hfvram.show.layout import size
from hfvram.show.web import charts, figures
from hfvram.show.web.asked import FORM, Asked, from_form, from_query
from hfvram.show.web.run import Pictures, Runner, Waiting

HERE: Final = Path(__file__).parent
EXAMPLE: Final = "mistralai/Mixtral-8x7B"
INTRO: Final = (
    "<h1>How much GPU memory does it need?</h1>"
    "<p>Of a model on the Hugging Face Hub, before anything is downloaded. "
    "No weight is read, no code of the repo is run.</p>"
)
SCALE: Final = (
    '<label class="scale"><span>{label}</span><input type="range" min="{low}" max="{high}" step="{step}" '
    'data-for="{control}" data-default="{default}" aria-label="{label}, as a slider"></label>'
)


def page(runner: Runner, *, local_gpu: bool) -> Any:
    """The page as Gradio has it. `local_gpu`: whether the visitor's machine is this one."""
    import gradio as gr

    names = [("none", ""), *((f"{g.name} ({size(g.memory_bytes)})", g.name) for g in gpus())]
    with gr.Blocks(title="hfvram: GPU memory of a model", analytics_enabled=False) as blocks:
        gr.HTML(INTRO)
        with gr.Row():
            with gr.Column(scale=2, min_width=300):
                model = gr.Textbox(
                    label="Model",
                    placeholder=f"ORG/NAME, as in {EXAMPLE}",
                    max_lines=1,
                    elem_id="model",
                )
                mode = gr.Radio(list(CHOICES["mode"]), value="inference", label="What for", elem_id="mode")
                ctx = gr.Textbox(
                    label="Context: tokens a sequence",
                    placeholder="4,096, or the model's limit if smaller",
                    max_lines=1,
                    elem_id="ctx",
                )
                gr.HTML(
                    elem_classes="slider",
                    value=SCALE.format(label="Context", low=7, high=20, step=0.5, control="ctx", default=12),
                )
                batch = gr.Textbox(label="Batch: sequences", placeholder="1", max_lines=1, elem_id="batch")
                gr.HTML(
                    elem_classes="slider",
                    value=SCALE.format(label="Batch", low=0, high=8, step=1, control="batch", default=0),
                )
                with gr.Row():
                    quant = gr.Dropdown(
                        list(CHOICES["quant"]),
                        value="auto",
                        label="Quantization",
                        allow_custom_value=True,
                        elem_id="quant",
                        min_width=150,
                    )
                    engine = gr.Dropdown(
                        list(CHOICES["engine"]), value="transformers", label="Engine", elem_id="engine", min_width=120
                    )
                gpu = gr.Dropdown(
                    names, value="", label="GPU: a name, or a size such as 24GB", allow_custom_value=True, elem_id="gpu"
                )
                more = gr.Textbox(
                    label="Other options, as the command line has them",
                    placeholder="--gradient-checkpointing --gpus 4 --fsdp full_shard",
                    max_lines=2,
                    elem_id="more",
                )
                with gr.Row():
                    ask = gr.Button("Estimate", variant="primary", elem_id="ask", min_width=120)
                    stop = gr.Button("Cancel", visible=False, elem_id="stop", min_width=100)
            with gr.Column(scale=3, min_width=300):
                told = gr.HTML(elem_id="told")
                found = gr.HTML(elem_id="found")
                curve = gr.Plot(visible=False, show_label=False, elem_id="curve")
                words = gr.HTML(elem_id="curve-words")
                course = gr.Plot(visible=False, show_label=False, elem_id="course")
        controls = [model, mode, ctx, batch, quant, engine, gpu, more]
        results = [told, found, curve, words, course, stop]

        def shown(*values: Any) -> dict[Any, Any]:
            return dict(zip(results, values, strict=True))

        hidden = gr.update(visible=False)
        idle, busy = gr.update(visible=False), gr.update(visible=True)

        async def respond(asked: Asked, visitor: str) -> AsyncGenerator[dict[Any, Any], None]:
            """The page after each step of an answer."""
            begun = False
            answered: Estimate | None = None
            try:
                async with aclosing(runner.answer(asked, visitor)) as steps:
                    async for step in steps:
                        if isinstance(step, Waiting):
                            said = figures.progress(step, asked)
                            yield (
                                {told: said, stop: busy}
                                if begun or answered
                                else shown(said, "", hidden, "", hidden, busy)
                            )
                            begun = True
                        elif isinstance(step, Estimate):
                            answered = step
                            drawing = "" if step.request.mode == "inference" else figures.DRAWING
                            yield shown(
                                drawing, figures.answer(step, asked), hidden, "", hidden, busy if drawing else idle
                            )
                        elif answered and (drawn := pictures(answered, step)):
                            yield drawn
                if not answered:
                    yield {told: figures.CANCELLED, stop: idle}
                else:
                    yield {told: "", stop: idle}
            except HfvramError as error:
                if answered:
                    yield {told: figures.notice(error.message), stop: idle}
                else:
                    yield shown("", figures.failure(error), hidden, "", hidden, idle)

        def pictures(e: Estimate, step: Pictures) -> dict[Any, Any]:
            drawn: dict[Any, Any] = {}
            if len(step.curve) > 1:
                drawn[curve] = gr.update(value=charts.curve(e, step.curve), visible=True)
                drawn[words] = figures.curve_table(step.curve)
            if step.course:
                drawn[course] = gr.update(value=charts.course(e, step.course), visible=True)
            return drawn

        async def asked_in_form(
            model: str,
            mode: str,
            ctx: str,
            batch: str,
            quant: str,
            engine: str,
            gpu: str,
            more: str,
            request: gr.Request,
        ) -> AsyncGenerator[dict[Any, Any], None]:
            values = dict(zip(FORM, (mode, ctx, batch, quant, engine, gpu), strict=True))
            try:
                asked = from_form(model, more, values, local_gpu=local_gpu)
            except HfvramError as error:
                yield shown("", figures.failure(error), hidden, "", hidden, idle)
                return
            async with aclosing(respond(asked, str(request.session_hash))) as updates:
                async for update in updates:
                    yield update

        async def asked_in_address(request: gr.Request) -> AsyncGenerator[dict[Any, Any], None]:
            try:
                asked = from_query(dict(request.query_params), local_gpu=local_gpu)
            except HfvramError as error:
                yield shown("", figures.failure(error), hidden, "", hidden, idle)
                return
            if asked is None:
                yield {told: ""}
                return
            yield dict(zip(controls, in_controls(asked), strict=True))
            async with aclosing(respond(asked, str(request.session_hash))) as updates:
                async for update in updates:
                    yield update

        def stopped(request: gr.Request) -> None:
            runner.stop(str(request.session_hash))

        any_number: dict[str, Any] = {"concurrency_limit": None, "show_progress": "hidden"}
        blocks.load(asked_in_address, None, [*controls, *results], api_name=False, **any_number)
        gr.on(
            [ask.click, model.submit, ctx.submit, batch.submit, more.submit],
            asked_in_form,
            controls,
            results,
            api_name="ask",
            trigger_mode="multiple",
            **any_number,
        ).then(None, None, None, js="() => window.hfvram && window.hfvram.remember()")
        stop.click(stopped, None, None, api_name=False, queue=False)
        blocks.unload(stopped)
    return blocks


def in_controls(asked: Asked) -> tuple[str, ...]:
    """What each control shows for a question; a control that can't show it leaves it to the other options."""
    values: dict[str, Any] = {"quant": "auto"} | dict(asked.options)
    for name in ("mode", "engine"):
        if values.get(name) not in CHOICES[name]:
            values[name] = CHOICES[name][0]
    return (asked.model, *(str(values.get(name, "")) for name in FORM), asked.more)
