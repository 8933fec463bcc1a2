"""The command line. Each command loads what it needs when it runs, so that `--help` is instant.

Exit codes: 0 done, 1 a bug of ours, 2 a mistake the user can mend, 130 interrupted.
"""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from crosstrain.errors import UserError, visible

app = typer.Typer(
    name="crosstrain", add_completion=False, pretty_exceptions_enable=False, help="Post-train language models and compare how."
)
data_app = typer.Typer(help="Look at data before training on it.")
app.add_typer(data_app, name="data")
methods_app = typer.Typer(help="List the methods, or show one.")
app.add_typer(methods_app, name="methods")

Set = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Override a setting, e.g. stages.0.learning_rate=1e-5.")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Check everything, print the plan and what it will take, and stop.")]
ModelOrRun = Annotated[str, typer.Argument(metavar="MODEL_OR_RUN", help="Bundled name, model folder, hub id, or run folder.")]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code; every error is one line on stderr."""
    args = list(sys.argv[1:] if argv is None else argv)
    os.environ.setdefault("TQDM_DISABLE", "1")  # libraries' own bars, which would fill logs; ours show what goes on
    command = typer.main.get_command(app)
    try:
        # Not `app(args)`: that one turns Ctrl-C and errors into its own words and exit codes.
        with command.make_context("crosstrain", args) as context:
            command.invoke(context)
        sys.stdout.flush()
        return 0
    except typer.Exit as done:
        return done.exit_code
    except typer.TyperException as error:
        at = getattr(getattr(error, "ctx", None), "command_path", "crosstrain")
        return _fail(f"{error.format_message()} (see {at} --help)", 2, args)
    except UserError as error:
        return _fail(str(error), 2, args)
    except (KeyboardInterrupt, typer.Abort):
        resumes = args[:1] in (["train"], ["study"])
        return _fail("interrupted" + ("; the same command goes on from the last checkpoint" if resumes else ""), 130, args)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception as error:
        hint = "" if "--debug" in args else "; --debug shows the traceback"
        return _fail(f"internal error: {type(error).__name__}: {error}{hint}", 1, args)


def _fail(message: str, code: int, args: Sequence[str]) -> int:
    if "--debug" in args:
        traceback.print_exc()
    print(f"error: {visible(' '.join(message.split()))}", file=sys.stderr)
    return code


def _version(wanted: bool) -> None:
    if wanted:
        from crosstrain import __version__

        print(f"crosstrain {__version__}")
        raise typer.Exit


@app.callback(invoke_without_command=True)
def _root(
    ctx: typer.Context,
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")] = False,
) -> None:
    _help_alone(ctx)


@data_app.callback(invoke_without_command=True)
def _data(ctx: typer.Context) -> None:
    _help_alone(ctx)


def _help_alone(ctx: typer.Context) -> None:
    if ctx.invoked_subcommand is None:
        print(ctx.get_help())
        raise typer.Exit


@app.command()
def train(
    recipe: Annotated[Path, typer.Argument(metavar="RECIPE.yaml", help="What to train, on what, how.")],
    overrides: Set = None,
    out: Annotated[Path | None, typer.Option(help="The run's folder; runs/<recipe name> when neither says.")] = None,
    dry_run: DryRun = False,
    debug: Debug = False,
) -> None:
    """Run one recipe. The same command again goes on where it was interrupted."""
    from crosstrain.config import load_recipe

    spec = load_recipe(recipe, overrides or [])
    from crosstrain import run  # torch; a wrong recipe is told before it is loaded

    if dry_run:
        print(run.plan(spec))
        return
    folder = out or Path(spec.output_dir or Path("runs") / recipe.stem)
    result = run.train(spec, folder)
    print(f"run: {result.folder}\nmodel: {result.folder / 'model'}")


@app.command()
def study(
    spec: Annotated[Path, typer.Argument(metavar="SPEC.yaml", help="The arms to compare and what they share.")],
    out: Annotated[Path | None, typer.Option(help="The study's folder; runs/<spec name> when not given.")] = None,
    quick: Annotated[bool, typer.Option("--quick", help="A three-minute taste, marked as such in the report.")] = False,
    tune: Annotated[bool, typer.Option("--tune", help="Search each arm's learning rate first.")] = False,
    overrides: Set = None,
    dry_run: DryRun = False,
    debug: Debug = False,
) -> None:
    """Train several ways under one budget and report which won. Finished runs are kept when it is started again."""
    from crosstrain.config import load_study

    loaded = load_study(spec, overrides or [])
    from crosstrain.studies import runner  # torch; a wrong spec is told before it is loaded
    from crosstrain.studies.report import write_report

    if dry_run:
        print(runner.plan(loaded, quick=quick, tune=tune))
        return
    folder = out or Path("runs") / spec.stem
    runner.run_study(loaded, folder, quick=quick, tune=tune)
    print(f"report: {write_report(folder)}")


@app.command(name="eval")
def evaluate(
    model: ModelOrRun,
    config: Annotated[
        Path | None,
        typer.Option("--config", "--recipe", help="A recipe; its `evaluation` says what to measure. A run brings its own."),
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Folder for evaluation.json and samples.jsonl.")] = None,
    overrides: Set = None,
    debug: Debug = False,
) -> None:
    """Measure a model on held-out questions, for forgetting, and against its base."""
    from crosstrain.cli_model import evaluate_and_print

    evaluate_and_print(model, config, out, overrides or [])


@app.command()
def sample(
    model: ModelOrRun,
    prompt: Annotated[
        str | None, typer.Option(help="Answer this and stop; otherwise chat, or answer each line of stdin.")
    ] = None,
    system: Annotated[str | None, typer.Option(help="System message.")] = None,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 takes the most likely token.")] = 0.7,
    max_completion_length: Annotated[int, typer.Option(min=1, help="Tokens after which an answer is cut.")] = 256,
    seed: Annotated[int, typer.Option(min=0, help="Same seed, same answers.")] = 0,
    debug: Debug = False,
) -> None:
    """Chat with a model or with the model of a run."""
    from crosstrain.cli_model import Chat, talk

    talk(Chat.load(model, system, temperature, max_completion_length, seed), prompt)


@app.command()
def report(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="A study's folder.")],
    debug: Debug = False,
) -> None:
    """Write a study's report again from the files in its folder."""
    from crosstrain.studies.report import write_report

    print(f"report: {write_report(folder)}")


@data_app.command(name="check")
def data_check(
    ctx: typer.Context,
    file: Annotated[
        Path, typer.Argument(metavar="FILE", help="JSONL, JSON, CSV, Parquet, a `datasets` folder, or a recipe (YAML).")
    ],
    model: Annotated[str, typer.Option(help="The model whose chat template and tokenizer to use.")] = "smollm2-135m-instruct",
    max_prompt_length: Annotated[int, typer.Option(min=1, help="Longer prompts are errors.")] = 512,
    max_length: Annotated[int, typer.Option(min=1, help="Longer prompt + answer rows are cut.")] = 1024,
    ask: Annotated[
        bool, typer.Option("--ask", help="Of a recipe: ask its data's teacher for the answers that are not there yet.")
    ] = False,
    debug: Debug = False,
) -> None:
    """Say what a file or a recipe's data hold and what would be trained, or which rows are wrong."""
    if file.suffix in (".yaml", ".yml"):
        from crosstrain.cli_data import check_recipe

        given = [
            name for name in ("model", "max_prompt_length", "max_length") if ctx.get_parameter_source(name).name != "DEFAULT"
        ]
        check_recipe(file, given, ask=ask)
        return
    if ask:
        raise UserError(f"--ask is for a recipe whose data have a `teacher`; {file} has rows alone, so leave it out")
    from crosstrain.data.check import check

    check(file, model, max_prompt_length=max_prompt_length, max_length=max_length)


@methods_app.callback(invoke_without_command=True)
def _methods(ctx: typer.Context, as_json: AsJson = False) -> None:
    if ctx.invoked_subcommand is None:
        from crosstrain.cli_methods import print_all

        print_all(as_json=as_json)


@methods_app.command(name="show")
def methods_show(
    name: Annotated[str, typer.Argument(metavar="NAME", help="A method's name, or my_file.py:my_function.")],
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Show one method: what it does, its terms, settings and paper."""
    from crosstrain.cli_methods import print_one

    print_one(name, as_json=as_json)


@app.command()
def explain(
    method: Annotated[str, typer.Argument(metavar="METHOD", help="A method's name, or my_file.py:my_function.")],
    batch: Annotated[
        Path | None, typer.Option(metavar="BATCH.json", help="Log-probs and rewards of a batch; docs/explain.md says how.")
    ] = None,
    model: Annotated[
        str | None, typer.Option(help="Instead of a batch: a model, whose first step on rows is shown (bundled by default).")
    ] = None,
    data: Annotated[list[str] | None, typer.Option(metavar="[STREAM=]FILE", help="The rows, as a recipe's `data`.")] = None,
    task: Annotated[list[str] | None, typer.Option(metavar="[STREAM=]TASK", help="Rows and reward of a task.")] = None,
    task_config: Annotated[list[str] | None, typer.Option(metavar="KEY=VALUE", help="A setting of the task.")] = None,
    reward: Annotated[
        list[str] | None, typer.Option(metavar="NAME", help="Scores completions; file.py:function or built in.")
    ] = None,
    example: Annotated[str | None, typer.Option(metavar="ID", help="Look at this row alone, e.g. train:3.")] = None,
    reference: Annotated[str | None, typer.Option(metavar="MODEL", help="The reference; the model itself by default.")] = None,
    old: Annotated[str | None, typer.Option(metavar="MODEL", help="What sampled; the model itself by default.")] = None,
    teacher: Annotated[str | None, typer.Option(metavar="MODEL", help="The model to learn from, for distillation.")] = None,
    batch_size: Annotated[int | None, typer.Option(min=1, help="Rows of the step; 4, or 1 with --example.")] = None,
    max_completion_length: Annotated[int | None, typer.Option(min=1, help="Tokens after which a completion is cut.")] = None,
    seed: Annotated[int | None, typer.Option(min=0, help="Which rows and samples.")] = None,
    overrides: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="A setting of the method, e.g. beta=0.1.")
    ] = None,
    out: Annotated[Path | None, typer.Option(metavar="FILE.html", help="Write a page with every token, too.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON: loss, terms, and every token's weight.")] = False,
    debug: Debug = False,
) -> None:
    """Show what a method does to every token: of a batch of log-probs, or of the first step of a model on rows."""
    given = {
        "--model": model, "--data": data, "--task": task, "--task-config": task_config, "--reward": reward, "--example": example,
        "--reference": reference, "--old": old, "--teacher": teacher, "--batch-size": batch_size,
        "--max-completion-length": max_completion_length, "--seed": seed, "--out": out,
    }  # fmt: skip
    if batch is not None:
        if useless := [option for option, value in given.items() if value is not None]:
            raise UserError(f"{useless[0]} has no effect beside --batch, whose log-probs need no model; leave one of them out")
        from crosstrain.cli_explain import explain_batch

        explain_batch(method, batch, overrides or [], as_json=as_json)
        return
    if not data and not task:
        raise UserError("explain needs something to look at: --data FILE or --task NAME (and --model), or --batch BATCH.json")
    from crosstrain.cli_explain_step import Asked, explain_model

    asked = Asked(
        method, model or "smollm2-135m-instruct", data or (), task or (), task_config or (), overrides or (), reward or (),
        example, reference, old, teacher, batch_size, max_completion_length, seed or 0,
    )  # fmt: skip
    explain_model(asked, out, as_json=as_json)


if __name__ == "__main__":
    sys.exit(main())
