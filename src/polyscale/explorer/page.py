"""The explorer's page, made with gradio (`pip install 'polyscale[app]'`)."""

import html
import os
from typing import Any

import gradio
from PIL import Image

from .exploring import Explorer, View


# Nothing is fetched from the network: no fonts, no analytics.
os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")

TITLE = "Polyscale: how many tokens does this image need?"
FONTS = {"font": ["system-ui", "sans-serif"], "font_mono": ["ui-monospace", "monospace"]}
CSS = """
.budget input[type=number], .budget .reset-button, .budget .tab-like-container { display: none; }
.budget input[type=range] { min-height: 32px; }
.budget .min_value, .budget .max_value { display: none; }
.samples, .samples .grid-wrap { height: auto !important; min-height: 0 !important; max-height: none !important; }
.answer { font-size: 1.05rem; line-height: 1.5; min-height: 5.5rem; }
.answer strong { font-size: 1.35rem; }
.problem { border-left: 4px solid #b91c1c; padding: 0.5rem 0.75rem; font-size: 1.05rem; }
:focus-visible { outline: 3px solid #2563eb; outline-offset: 2px; }
@media (max-width: 640px) { .samples .grid-container { grid-template-columns: repeat(3, 1fr) !important; } }
"""


def answer_html(view: View) -> str:
    """What a model said at a budget, as the page shows it. Labels come from checkpoints, so they are escaped."""
    budget = f"{html.escape(view.budget)} · " if view.budget else ""
    return (
        f'<div class="answer"><strong>{html.escape(view.label)}</strong> {view.score:.1%}<br>'
        f"{budget}{view.tokens} tokens<br>{view.milliseconds:.1f} ms</div>"
    )


def problem_html(error: Exception | None) -> str:
    """One sentence about what went wrong; empty when nothing did."""
    return "" if error is None else f'<div class="problem" role="alert">{html.escape(str(error))}</div>'


class Page:
    """The functions behind the page. Each answers with values of gradio's components and never raises."""

    def __init__(self, explorer: Explorer):
        self.explorer = explorer

    def samples(self, title: str) -> list[str]:
        """The files of the sample photographs that fit a checkpoint."""
        return [str(file) for file in self.explorer.photographs(title)]

    def show(self, title: str, file: str, position: float) -> tuple[Image.Image | None, str, str]:
        """A panel at a slider's position: drawing, answer, problem."""
        try:
            budgets = self.explorer.budgets(title)
            view = self.explorer.view(title, file, budgets[min(max(int(position), 1), len(budgets)) - 1])
        except (ArithmeticError, OSError, RuntimeError, TypeError, ValueError) as error:
            return None, "", problem_html(error)
        return view.drawing, answer_html(view), ""

    def both(self, title: str, file: str, left: float, right: float) -> tuple:
        """Both panels."""
        left_drawing, left_answer, problem = self.show(title, file, left)
        right_drawing, right_answer, right_problem = self.show(title, file, right)
        return left_drawing, left_answer, right_drawing, right_answer, problem or right_problem

    def sliders(self, title: str) -> tuple[Any, Any]:
        """Both sliders for a checkpoint: the left at its smallest budget, the right at its largest."""
        try:
            count = len(self.explorer.budgets(title))
        except (OSError, ValueError):
            count = 1
        options = {"maximum": max(count, 2), "interactive": count > 1}
        return gradio.Slider(value=1, **options), gradio.Slider(value=count, **options)

    def choose(self, title: str, shown: list[str], file: str) -> tuple[Any, Any, Any, list[str], str]:
        """What follows a newly chosen checkpoint: both sliders, the gallery, the files in it, the file to look at.

        An image of the user's own stays, and so does a sample photograph that fits the checkpoint. Any other gives way
        to the first that does.
        """
        samples = self.samples(title)
        if samples == shown:
            return *self.sliders(title), gradio.skip(), shown, file
        gallery = gradio.Gallery(samples, selected_index=None)
        return *self.sliders(title), gallery, samples, samples[0] if file in shown else file

    def upload(self, file: str | None, current: str) -> tuple[str, str]:
        """The file to look at from now on, and a problem: a bad upload leaves the image before it."""
        if file is None:
            return current, ""
        try:
            self.explorer.check(file)
        except ValueError as error:
            return current, problem_html(error)
        return file, ""


def build_page(explorer: Explorer) -> gradio.Blocks:
    """The page.

    Args:
        explorer (`Explorer`): the checkpoints to choose from.

    Returns:
        `gradio.Blocks`: `launch(**launch_options())` starts it.
    """
    page = Page(explorer)
    title = explorer.titles[0]
    left_start, right_start = page.sliders(title)
    first_samples = page.samples(title)
    first = page.both(title, first_samples[0], 1, right_start.value)
    with gradio.Blocks(title=TITLE, analytics_enabled=False) as blocks:
        gradio.Markdown(f"# {TITLE}")
        file = gradio.State(first_samples[0])
        shown = gradio.State(first_samples)
        with gradio.Row():
            checkpoint = gradio.Dropdown(explorer.titles, value=title, label="Checkpoint", min_width=240)
            upload = gradio.File(label="Your image", type="filepath", height=140, min_width=240)
        samples = gradio.Gallery(
            first_samples,
            label="Sample photographs",
            show_label=False,
            columns=6,
            height="auto",
            allow_preview=False,
            interactive=False,
            object_fit="cover",
            buttons=[],
            elem_classes=["samples"],
        )
        problem = gradio.HTML(first[4])
        panels = []
        with gradio.Row():
            for side, start, (drawing, answer) in (
                ("Left", left_start, first[:2]),
                ("Right", right_start, first[2:4]),
            ):
                with gradio.Column(min_width=150):
                    slider = gradio.Slider(
                        1,
                        start.maximum,
                        value=start.value,
                        step=1,
                        label=f"{side} budget: few tokens to many",
                        interactive=start.interactive,
                        elem_classes=["budget"],
                        elem_id=f"{side.lower()}-budget",
                        buttons=[],
                    )
                    panels.append(
                        (
                            slider,
                            gradio.Image(
                                drawing,
                                label=f"{side}: what the model sees",
                                show_label=False,
                                interactive=False,
                                format="png",
                                buttons=[],
                                elem_id=f"{side.lower()}-drawing",
                            ),
                            gradio.HTML(answer, elem_id=f"{side.lower()}-answer"),
                        )
                    )
        sliders = [panel[0] for panel in panels]
        everything = [part for panel in panels for part in panel[1:]] + [problem]
        one_at_a_time = {"concurrency_id": "model", "concurrency_limit": 1, "show_progress": "hidden"}

        for slider, drawing, answer in panels:
            slider.input(
                page.show,
                [checkpoint, file, slider],
                [drawing, answer, problem],
                trigger_mode="always_last",
                **one_at_a_time,
            )

        def look(inputs: list) -> dict:
            return {"fn": page.both, "inputs": inputs, "outputs": everything, **one_at_a_time}

        def choose_sample(shown: list[str], event: gradio.SelectData) -> str:
            return shown[event.index]

        state = [checkpoint, file, *sliders]
        checkpoint.input(
            page.choose, [checkpoint, shown, file], [*sliders, samples, shown, file], **one_at_a_time
        ).then(**look(state))
        samples.select(choose_sample, shown, file, show_progress="hidden").then(**look(state))
        upload.upload(page.upload, [upload, file], [file, problem], **one_at_a_time).then(
            lambda said, *values: (*page.both(*values)[:4], said), [problem, *state], everything, **one_at_a_time
        )
    return blocks


def launch_options(host: str = "127.0.0.1", port: int | None = None) -> dict[str, Any]:
    """Arguments of `gradio.Blocks.launch` for the page: nothing leaves this machine.

    Args:
        host (`str`, *optional*, defaults to `"127.0.0.1"`): address to listen on; `"0.0.0.0"` lets others in.
        port (`int`, *optional*): the first free one from 7860 on when `None`.
    """
    return {
        "server_name": host,
        "server_port": port,
        "share": False,
        "ssr_mode": False,
        "footer_links": [],
        "max_file_size": "64mb",
        "css": CSS,
        "theme": gradio.themes.Default(**FONTS),
    }


__all__ = ["Page", "answer_html", "build_page", "launch_options", "problem_html"]
