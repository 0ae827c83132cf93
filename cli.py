"""clipmill's command line: parse, call, print. Everything heavy is imported inside the command that needs it."""

from __future__ import annotations

import contextlib
import json
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from engine.errors import ClipmillError

if TYPE_CHECKING:
    from engine.bundle import Bundle
    from engine.datasets import Dataset
    from engine.stream import Settings
    from probes.embeddings import ImageEmbeddings, RunBlocks, TextEmbeddings
    from probes.fused_metrics import Strategy
    from probes.study import Row, Source

DEFAULT_TEMPLATE = "a photo of a {}"
EXPORTABLE = (
    "a hub id, a folder with a Hugging Face checkpoint, mini (embedded) and random-vit-b-32 (untrained, for benchmarks)"
)
BENCHMARKS = ("extract", "session", "text", "decode", "memory", "start", "kernels", "all")
STUDIES = ("thesis", "visapp")
STRATEGIES = ("task", "grouped", "swapped", "image-only")
CLASSIFIERS = ("svm", "scaled-svm", "chosen-svm", "logistic", "knn", "mlp")
EXPORT_EXTRA = {"torch", "transformers", "optimum", "onnx", "onnxscript", "huggingface_hub"}


class Boundary(click.Group):
    """The one place where a user's mistake becomes one line and exit code 1; a bug keeps its traceback."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(self.commands)  # in the order of work, not of the alphabet

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except ClipmillError as error:
            raise click.ClickException(" ".join(str(error).split())) from error


@click.group(cls=Boundary, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(package_name="clipmill")
def main() -> None:
    """clipmill turns images and prompts into certified CLIP embeddings, and tells what the model understood.

    \b
    Example:
      python cli.py demo
    """


# Options that several commands take ---------------------------------------------------------------------------------

json_option = click.option("--json", "as_json", is_flag=True, help="Print one JSON object to stdout.")
model_option = click.option(
    "--model",
    metavar="BUNDLE",
    help="Bundle folder, or its name under models/.  [default: models/clip-vit-base-patch32]",
)
provider_option = click.option(
    "--provider",
    type=click.Choice(["auto", "cpu", "cuda", "tensorrt"]),
    default="auto",
    show_default=True,
    help="What runs the model; the one asked for runs, or the command fails. See `providers`.",
)
device_option = click.option(
    "--device-id", type=click.IntRange(min=0), default=0, show_default=True, help="The GPU, as CUDA counts them."
)
threads_option = click.option(
    "--threads",
    type=click.IntRange(min=1),
    help="Batches run at once on the CPU, one thread each; a GPU runs two.  [default: usable CPUs]",
)
verify_option = click.option("--no-verify", is_flag=True, help="Do not check the sha256 of the bundle's files.")
data_dir_option = click.option(
    "--data-dir",
    type=click.Path(file_okay=False, path_type=Path),
    help="Where downloads lie.  [default: $CLIPMILL_DATA_DIR, else datasets_cache/]",
)
prompts_help = "Built-in set (see `prompts`), text file with one prompt a line, or - for stdin"


# demo ---------------------------------------------------------------------------------------------------------------


@main.command()
@click.option("--output", type=click.Path(path_type=Path), help="Folder for everything.  [default: demo/<time>]")
@json_option
def demo(output: Path | None, as_json: bool) -> None:
    """Everything below, on the embedded model and sample.

    Exports the model, extracts the sample's train and test images, embeds prompts, runs four probes, prints one table.

    \b
    Example:
      python cli.py demo
    """
    from engine.datasets import open_dataset
    from engine.shards import write_table
    from engine.stream import Settings
    from engine.text import embed_prompts, text_table
    from probes.clustering import cluster
    from probes.embeddings import load_run
    from probes.linear import baseline, class_agnostic
    from probes.prompts import fill_template, read_prompts
    from probes.zero_shot import zero_shot

    started = time.perf_counter()
    folder = output or Path("demo") / time.strftime("%Y%m%d-%H%M%S")
    if folder.exists():
        raise ClipmillError(f"{folder} exists: the demo starts afresh, choose another --output")
    bundle = run_export("mini", folder / "models" / "mini")
    for split in ("train", "test"):
        run_extract(bundle, open_dataset("cifar10-sample", split), folder / "runs" / split, Settings())
    train, test = load_run(folder / "runs" / "train"), load_run(folder / "runs" / "test")

    def embed(name: str, prompts: list[str]) -> Any:
        embeddings = embed_prompts(bundle, prompts)
        write_table(folder / "runs" / f"{name}.parquet", text_table(bundle, prompts, embeddings))
        return embeddings

    classes = embed("classes", fill_template("a photo of {a}", test.class_names))
    generic = embed("generic-32", read_prompts("generic-32"))
    say("probing")
    results = [
        baseline(train.X, train.y, test.X, test.y),
        zero_shot(test.X, test.y, classes),
        class_agnostic(train.X, train.y, test.X, test.y, generic),
        cluster(test.X, test.y),
    ]
    found = {
        "folder": str(folder),
        "certificate": bundle.certificate,
        "results": results,
        "seconds": round(time.perf_counter() - started, 1),
    }
    if as_json:
        click.echo(json.dumps(found))
        return
    click.echo(
        f"\nWhat the embedded miniature CLIP understood of {len(test.y)} CIFAR-10 test images "
        f"({len(train.y)} to learn from)\n\n{'probe':<16}{'measure':<12}{'found':>8}{'chance':>8}{'entropy':>17}"
    )
    for result in results:
        measure = "purity" if "purity" in result else "accuracy"
        entropy = f"{result['mean_entropy']:.3f} of {result['max_entropy']:.3f}" if "mean_entropy" in result else ""
        click.echo(f"{result['probe']:<16}{measure:<12}{result[measure]:>8.3f}{result['chance']:>8.3f}{entropy:>17}")
    click.echo(
        f"\n{found['seconds']} s. A demonstration model: these are not CLIP's results.\n"
        f"bundle  {folder}/models/mini\nruns    {folder}/runs/train  {folder}/runs/test\n"
        f"prompts {folder}/runs/classes.parquet  {folder}/runs/generic-32.parquet"
    )


# export -------------------------------------------------------------------------------------------------------------


@main.command("export")
@click.option(
    "--model",
    default="openai/clip-vit-base-patch32",
    show_default=True,
    metavar="ID|PATH|mini|random-vit-b-32",
    help=f"What to convert: {EXPORTABLE}.",
)
@click.option(
    "--provider",
    type=click.Choice(["auto", "cpu", "cuda", "tensorrt"]),
    default="auto",
    show_default=True,
    help="What the bundle is for; auto: cuda where there is an NVIDIA driver, else cpu.",
)
@click.option(
    "--precision",
    type=click.Choice(["fp32", "fp16", "int8"]),
    help="int8 is for cpu, fp16 for cuda and tensorrt.  [default: fp32 for cpu, else fp16]",
)
@click.option(
    "--output",
    type=click.Path(path_type=Path),
    help="Bundle folder.  [default: models/<name of the model>, with a suffix such as -cpu-int8 unless cpu and fp32]",
)
@json_option
def export_command(model: str, provider: str, precision: str | None, output: Path | None, as_json: bool) -> None:
    """Convert a CLIP checkpoint to a bundle: both towers as ONNX, with a fidelity certificate.

    Nothing is left when the certificate misses its bar. Needs the `export` extra (torch, transformers, optimum).

    \b
    Example:
      python cli.py export
      python cli.py export --model mini --precision int8
      python cli.py export --provider cuda
    """
    bundle = run_export(model, output, provider, precision)
    certificate = bundle.certificate
    say(
        f"certified on {certificate['images']} images and {certificate['prompts']} prompts against PyTorch fp32: "
        f"min cosine image {certificate['image']['min_cosine']:.7f}, text {certificate['text']['min_cosine']:.7f}"
    )
    if certificate["caveat"]:
        say(f"the certificate was {certificate['caveat']}")
    emit({"bundle": str(bundle.path), "fingerprint": bundle.fingerprint, "certificate": certificate}, as_json, "bundle")


def run_export(model: str, output: Path | None = None, provider: str = "cpu", precision: str | None = None) -> Bundle:
    from engine.bundle import default_output

    try:
        from export.to_onnx import choose_target, export_bundle
    except ModuleNotFoundError as error:
        if (error.name or "").split(".")[0] not in EXPORT_EXTRA:
            raise
        raise ClipmillError(f"export needs {error.name}, which is not installed: pip install -e '.[export]'") from error
    target = choose_target(provider, precision)
    return export_bundle(model, output or default_output(model, target), target, progress=say)


# extract ------------------------------------------------------------------------------------------------------------


@main.command()
@click.option("--dataset", required=True, metavar="NAME|SOURCE:PATH", help="See `python cli.py datasets`.")
@model_option
@click.option("--split", metavar="train|test|all", help="Part of the dataset.  [default: test, where there is one]")
@click.option("--classes", metavar="A,B,...|N", help="Only these classes, or N of them drawn by --class-seed.")
@click.option("--class-seed", type=int, default=0, show_default=True, help="Draws the classes.")
@click.option("--sample", type=int, metavar="N", help="N rows drawn by --seed, each class in its share.")
@click.option("--seed", type=int, default=0, show_default=True, help="Draws the sample.")
@click.option("--limit", type=int, metavar="N", help="Take the first N rows only.")
@data_dir_option
@click.option("--no-download", is_flag=True, help="Fail where the dataset is not there yet.")
@provider_option
@device_option
@click.option(
    "--batch-size",
    type=click.IntRange(min=1),
    help="Images a batch.  [default: 8 on the CPU, on a GPU 256, or what its memory allows; a resumed run's own]",
)
@click.option("--workers", type=click.IntRange(min=1), help="Decode threads.  [default: usable CPUs]")
@threads_option
@click.option("--shard-size", type=click.IntRange(min=1), default=5_000, show_default=True, help="Rows a shard.")
@click.option(
    "--format",
    type=click.Choice(["parquet", "arrow"]),
    default="parquet",
    show_default=True,
    help="Of the shards; Arrow IPC files memory-map to NumPy.",
)
@click.option(
    "--dtype",
    type=click.Choice(["float32", "float16"]),
    default="float32",
    show_default=True,
    help="Of the embeddings as written.",
)
@click.option(
    "--max-pixels",
    type=click.IntRange(min=1),
    default=89_478_485,
    show_default=True,
    help="Reject an image with more, before it is decoded or by its size when resized.",
)
@click.option(
    "--on-error",
    type=click.Choice(["reject", "fail"]),
    default="reject",
    show_default=True,
    help="A bad image becomes a row of rejects.parquet, or stops the run.",
)
@click.option("--output", metavar="DIR", help="Run folder.  [default: runs/<dataset>-<split>-<bundle>]")
@click.option("--overwrite", is_flag=True, help="Replace the run that is there.")
@verify_option
@json_option
def extract(
    dataset: str,
    model: str | None,
    split: str | None,
    classes: str | None,
    class_seed: int,
    sample: int | None,
    seed: int,
    limit: int | None,
    data_dir: Path | None,
    no_download: bool,
    output: str | None,
    on_error: str,
    no_verify: bool,
    as_json: bool,
    **settings: Any,
) -> None:
    """Embed the images of a dataset into Parquet or Arrow shards with a manifest.

    The same command again continues an interrupted run, and leaves a complete one as it is.

    \b
    Example:
      python cli.py extract --dataset cifar10-sample --model mini
      python cli.py extract --dataset folder:photos --provider cuda --output runs/photos
      python cli.py extract --dataset tiny-imagenet --classes 100 --class-seed 7 --output runs/tiny-100
    """
    from engine.bundle import find_bundle
    from engine.datasets import open_dataset
    from engine.stream import Settings

    source = open_dataset(
        dataset,
        split,
        limit,
        classes=classes,
        class_seed=class_seed,
        sample=sample,
        seed=seed,
        data_dir=data_dir,
        download=not no_download,
    )
    for note in source.notes:
        say(note)
    bundle = find_bundle(model, settings["provider"], verify=not no_verify)
    manifest = run_extract(
        bundle,
        source,
        local_path(output) if output else Path("runs") / f"{source.slug}-{source.split}-{bundle.name}",
        Settings(fail_on_error=on_error == "fail", **settings),
    )
    emit(manifest, as_json, "run")


def run_extract(bundle: Bundle, source: Dataset, output: Path, settings: Settings) -> dict[str, Any]:
    """Extract with a progress bar; say what came of it; the manifest, with the run's path first."""
    from engine.stream import extract

    with progress_bar(source.rows, source.name) as advanced:
        manifest = extract(bundle, source, output, settings, started=say, advanced=advanced)
    summary = manifest["summary"]
    say(
        f"{manifest['written']} embeddings, {manifest['rejected']} rejects; {summary['images']} images in "
        f"{summary['seconds']:.1f} s, {summary['images_per_second']:.0f} images/s, bound by {summary['bound_by']}"
    )
    for stage, seconds in summary["stages"].items():
        say(f"  {stage:<7} busy {seconds['busy']:8.2f} s   waiting {seconds['waiting']:8.2f} s")
    if summary["peak_rss_bytes"]:
        say(f"  peak memory {summary['peak_rss_bytes'] / 2**20:.0f} MiB")
    return {"run": str(output), **manifest}


# embed-text ---------------------------------------------------------------------------------------------------------


@main.command("embed-text")
@click.option("--prompts", required=True, metavar="SET|FILE|-", help=f"{prompts_help}.")
@click.option("--template", help='Put each line into a template: "a photo of a {}", or "a photo of {a}" for a/an.')
@model_option
@provider_option
@device_option
@threads_option
@click.option("--output", metavar="FILE", help="Parquet table.  [default: runs/text-<prompts>-<bundle>.parquet]")
@verify_option
@json_option
def embed_text(
    prompts: str,
    template: str | None,
    model: str | None,
    provider: str,
    device_id: int,
    threads: int | None,
    output: str | None,
    no_verify: bool,
    as_json: bool,
) -> None:
    """Embed prompts into a Parquet table of prompt and embedding.

    \b
    Example:
      python cli.py embed-text --prompts generic-32 --model mini
      python cli.py embed-text --prompts classes.txt --template "a photo of {a}" --model mini
    """
    from engine.bundle import find_bundle
    from engine.shards import write_table
    from engine.text import embed_prompts, text_table

    texts = filled(prompts, template)
    bundle = find_bundle(model, provider, verify=not no_verify)
    name = "stdin" if prompts == "-" else Path(prompts).stem
    path = local_path(output) if output else Path("runs") / f"text-{name}-{bundle.name}.parquet"
    embeddings = embed_prompts(bundle, texts, provider, device_id=device_id, threads=threads, started=say)
    write_table(path, text_table(bundle, texts, embeddings))
    say(f"{len(texts)} prompts embedded")
    emit({"table": str(path), "prompts": len(texts), "bundle": bundle.fingerprint}, as_json, "table")


def filled(prompts: str, template: str | None) -> list[str]:
    from probes.prompts import fill_template, read_prompts

    lines = read_prompts(prompts)
    return fill_template(template, lines) if template else lines


# probe --------------------------------------------------------------------------------------------------------------


@main.group()
def probe() -> None:
    """Ask what the embeddings of a run know.

    \b
    Example:
      python cli.py probe zero-shot --test runs/cifar10-sample-test-mini
    """


train_option = click.option("--train", required=True, metavar="RUN", help="Run folder to learn from.")
test_option = click.option("--test", required=True, metavar="RUN", help="Run folder to score on.")


def prompts_option(default: str) -> Callable[..., Any]:
    return click.option(
        "--prompts", default=default, show_default=True, metavar="SET|FILE|TABLE", help=f"{prompts_help}, or a table."
    )


template_option = click.option(
    "--template",
    multiple=True,
    help="Prompt of a class: {} is its name, {a} the name with a/an, {raw} the name with its underscores.  "
    f'[default: "{DEFAULT_TEMPLATE}"]',
)
tau_option = click.option(
    "--tau",
    type=click.FloatRange(min=0, min_open=True),
    default=1.0,
    show_default=True,
    help="Temperature of the softmax whose mean entropy is given.",
)
run_model_option = click.option(
    "--model",
    metavar="BUNDLE",
    help="Bundle that embeds the prompts; it must be the run's.  [default: the one of that name under models/]",
)
result_option = click.option(
    "--output", type=click.Path(dir_okay=False, path_type=Path), help="Also write the result as JSON to this file."
)


@probe.command("zero-shot")
@test_option
@template_option
@click.option("--prompts", metavar="FILE|TABLE", help="One prompt a class, in label order, in place of --template.")
@tau_option
@run_model_option
@provider_option
@result_option
@json_option
def zero_shot(
    test: str,
    template: tuple[str, ...],
    prompts: str | None,
    tau: float,
    model: str | None,
    provider: str,
    output: Path | None,
    as_json: bool,
) -> None:
    """Classify by the nearest class prompt; nothing is learned.

    Several templates make an ensemble: the mean of their embeddings stands for a class.

    \b
    Example:
      python cli.py probe zero-shot --test runs/cifar10-sample-test-mini --template "a photo of {a}"
      python cli.py probe zero-shot --test runs/cifar10-sample-test-mini --template "{a}" --template "a picture of {a}"
    """
    from probes.common import name_classes
    from probes.embeddings import load_run
    from probes.zero_shot import zero_shot

    if prompts and template:
        raise click.UsageError("--prompts and --template exclude each other: the prompts are used as they are.")
    run = load_run(test)
    if prompts:
        text = text_embeddings(prompts, run, model, provider)
        if len(text.prompts) != len(run.classes):
            raise ClipmillError(
                f"--prompts {prompts} holds {len(text.prompts)} prompts, the run at {test} has {len(run.classes)} "
                "classes: zero-shot needs one prompt a class, in label order"
            )
    else:
        text = class_embeddings(template, run, model, provider)
    with mistakes_of("zero-shot"):
        result = zero_shot(run.X, run.positions(), text.X, tau)
        result = name_classes(result, run.decided())
    report({**result, "class_prompts": text.prompts, "test": described(run)}, output, as_json)


@probe.command()
@train_option
@test_option
@result_option
@json_option
def baseline(train: str, test: str, output: Path | None, as_json: bool) -> None:
    """Supervised baseline: StandardScaler and a linear SVM on the image embeddings.

    \b
    Example:
      python cli.py probe baseline --train runs/cifar10-sample-train-mini --test runs/cifar10-sample-test-mini
    """
    from probes.common import name_classes
    from probes.linear import baseline

    train_run, test_run = comparable_runs(train, test)
    with mistakes_of("baseline"):
        result = name_classes(baseline(train_run.X, train_run.y, test_run.X, test_run.y), test_run.class_names)
    report({**result, "train": described(train_run), "test": described(test_run)}, output, as_json)


@probe.command("class-agnostic")
@train_option
@test_option
@prompts_option("generic-32")
@tau_option
@click.option(
    "--classifier",
    type=click.Choice(CLASSIFIERS),
    default="svm",
    show_default=True,
    help="What learns from the logits; chosen-svm, logistic and knn choose a parameter on a validation part.",
)
@run_model_option
@provider_option
@result_option
@json_option
def class_agnostic(
    train: str,
    test: str,
    prompts: str,
    tau: float,
    classifier: str,
    model: str | None,
    provider: str,
    output: Path | None,
    as_json: bool,
) -> None:
    """A linear SVM on what prompts that name no class say of an image: cosine logits / tau.

    \b
    Example:
      python cli.py probe class-agnostic --train runs/cifar10-sample-train-mini --test runs/cifar10-sample-test-mini
    """
    from probes.common import name_classes
    from probes.linear import class_agnostic

    train_run, test_run = comparable_runs(train, test)
    text = text_embeddings(prompts, test_run, model, provider)
    with mistakes_of("class-agnostic"):
        result = class_agnostic(train_run.X, train_run.y, test_run.X, test_run.y, text.X, tau, classifier)
        result = name_classes(result, test_run.class_names)
    report(
        {**result, "prompt_set": prompts, "train": described(train_run), "test": described(test_run)}, output, as_json
    )


@probe.command()
@click.option("--train", metavar="RUN", help="Run folder to learn from; without it, entropies alone are computed.")
@test_option
@prompts_option("alternative-32")
@click.option("--taus", default="0.5,0.07,0.05,0.03,0.02", show_default=True, help="Temperatures, with commas between.")
@run_model_option
@provider_option
@result_option
@json_option
def temperature(
    train: str | None,
    test: str,
    prompts: str,
    taus: str,
    model: str | None,
    provider: str,
    output: Path | None,
    as_json: bool,
) -> None:
    """What tau does to the entropy of softmax(z / tau), and to an SVM on z / tau.

    Without --train the test run is read block by block, so it may be of any size.

    \b
    Example:
      python cli.py probe temperature --train runs/cifar10-sample-train-mini --test runs/cifar10-sample-test-mini
      python cli.py probe temperature --test runs/cifar10-sample-test-mini --taus 1,0.1,0.01
    """
    from probes.embeddings import open_run
    from probes.temperature import entropy_sweep, temperature

    chosen = numbers(taus, "--taus")
    if train:
        train_run, test_run = comparable_runs(train, test)
        text = text_embeddings(prompts, test_run, model, provider)
        with mistakes_of("temperature"):
            result = temperature(train_run.X, train_run.y, test_run.X, test_run.y, text.X, chosen)
    else:
        blocks = open_run(test)
        text = text_embeddings(prompts, blocks, model, provider)
        with mistakes_of("temperature"):
            result = entropy_sweep(blocks.embeddings(), text.X, chosen)
    report({**result, "prompt_set": prompts, "train": {"run": train}, "test": {"run": test}}, output, as_json)


@probe.command()
@train_option
@test_option
@click.option(
    "--prompts",
    multiple=True,
    default=("generic-32", "generic-99", "generic-205", "generic-415"),
    show_default=True,
    metavar="SET|FILE|TABLE",
    help=f"{prompts_help}, or a table; once for each set.",
)
@run_model_option
@provider_option
@result_option
@json_option
def vocabulary(
    train: str,
    test: str,
    prompts: tuple[str, ...],
    model: str | None,
    provider: str,
    output: Path | None,
    as_json: bool,
) -> None:
    """What more prompts add: the class-agnostic SVM on prompt sets of growing size.

    \b
    Example:
      python cli.py probe vocabulary --train runs/cifar10-sample-train-mini --test runs/cifar10-sample-test-mini
    """
    from probes.vocabulary import vocabulary

    train_run, test_run = comparable_runs(train, test)
    texts = {name: text_embeddings(name, test_run, model, provider).X for name in prompts}
    with mistakes_of("vocabulary"):
        result = vocabulary(train_run.X, train_run.y, test_run.X, test_run.y, texts)
    report({**result, "train": described(train_run), "test": described(test_run)}, output, as_json)


@probe.command()
@test_option
@click.option(
    "--prompts", metavar="SET|FILE|TABLE", help=f"Cluster the logits of these, not the embeddings: {prompts_help}."
)
@click.option("--clusters", type=click.IntRange(min=1), help="Number of clusters.  [default: number of labels]")
@run_model_option
@provider_option
@result_option
@json_option
def cluster(
    test: str,
    prompts: str | None,
    clusters: int | None,
    model: str | None,
    provider: str,
    output: Path | None,
    as_json: bool,
) -> None:
    """k-means on embeddings or logits: do clusters, found without labels, hold one class each?

    \b
    Example:
      python cli.py probe cluster --test runs/cifar10-sample-test-mini
      python cli.py probe cluster --test runs/cifar10-sample-test-mini --prompts generic-415
    """
    from engine.kernels import cosine_logits
    from probes.clustering import cluster
    from probes.embeddings import load_run

    run = load_run(test)
    text = text_embeddings(prompts, run, model, provider) if prompts else None
    with mistakes_of("cluster"):
        result = cluster(cosine_logits(run.X, text.X) if text else run.X, run.y, clusters)
    features = f"logits of {prompts}" if prompts else "image embeddings"
    report({**result, "features": features, "test": described(run)}, output, as_json)


@probe.command()
@train_option
@test_option
@template_option
@run_model_option
@provider_option
@result_option
@json_option
def calibration(
    train: str,
    test: str,
    template: tuple[str, ...],
    model: str | None,
    provider: str,
    output: Path | None,
    as_json: bool,
) -> None:
    """Is zero-shot as sure as it is right? At the model's own tau, and at the one fitted to the train run.

    \b
    Example:
      python cli.py probe calibration --train runs/cifar10-sample-train-mini --test runs/cifar10-sample-test-mini
    """
    from probes.calibration import calibrated_zero_shot

    train_run, test_run = comparable_runs(train, test)
    text = class_embeddings(template, test_run, model, provider)
    tau = 1 / bundle_of(test_run, model).architecture.logit_scale
    with mistakes_of("calibration"):
        result = calibrated_zero_shot(train_run.X, train_run.positions(), test_run.X, test_run.positions(), text.X, tau)
    report({**result, "train": described(train_run), "test": described(test_run)}, output, as_json)


@probe.command("redundancy")
@train_option
@test_option
@prompts_option("generic-415")
@run_model_option
@provider_option
@result_option
@json_option
def redundancy_command(
    train: str, test: str, prompts: str, model: str | None, provider: str, output: Path | None, as_json: bool
) -> None:
    """How many prompts of a set say something new: effective rank, accuracy of the first k of a greedy choice.

    \b
    Example:
      python cli.py probe redundancy --train runs/cifar10-sample-train-mini --test runs/cifar10-sample-test-mini
    """
    from probes.redundancy import redundancy

    train_run, test_run = comparable_runs(train, test)
    text = text_embeddings(prompts, test_run, model, provider)
    with mistakes_of("redundancy"):
        result = redundancy(train_run.X, train_run.y, test_run.X, test_run.y, text.X)
    result["first"] = [text.prompts[index] for index in result["first"]]
    report(
        {**result, "prompt_set": prompts, "train": described(train_run), "test": described(test_run)}, output, as_json
    )


@probe.command("modality-gap")
@test_option
@template_option
@run_model_option
@provider_option
@result_option
@json_option
def modality_gap_command(
    test: str, template: tuple[str, ...], model: str | None, provider: str, output: Path | None, as_json: bool
) -> None:
    """How far apart images and class prompts lie, whatever they show.

    \b
    Example:
      python cli.py probe modality-gap --test runs/cifar10-sample-test-mini
    """
    from probes.embeddings import load_run
    from probes.modality import modality_gap

    run = load_run(test)
    text = class_embeddings(template, run, model, provider)
    with mistakes_of("modality-gap"):
        result = modality_gap(run.X, run.positions(), text.X)
    report({**result, "class_prompts": text.prompts, "test": described(run)}, output, as_json)


@probe.command("fused")
@train_option
@test_option
@click.option("--strategy", type=click.Choice(STRATEGIES), required=True, help="Which prompt goes with which class.")
@click.option(
    "--map",
    "map_name",
    required=True,
    metavar="NAME|FILE",
    help="Prompts of classes and groups: digits, cifar10, cifar100.",
)
@click.option(
    "--clusters-per-class", type=click.IntRange(min=1), help="[default: 1, 2 or 5, chosen on a validation part]"
)
@run_model_option
@provider_option
@result_option
@json_option
def fused_command(
    train: str,
    test: str,
    strategy: Strategy,
    map_name: str,
    clusters_per_class: int | None,
    model: str | None,
    provider: str,
    output: Path | None,
    as_json: bool,
) -> None:
    """Classify by clusters of fused image and prompt embeddings, beside nearest centroid and zero-shot.

    \b
    Example:
      python cli.py probe fused --strategy task --map cifar10 \\
        --train runs/cifar10-sample-train-mini --test runs/cifar10-sample-test-mini
    """
    from probes.embeddings import require_same_bundle
    from probes.experiments import fused_runs
    from probes.prompt_maps import read_map

    train_run, test_run = comparable_runs(train, test)

    def embed(prompts: Sequence[str]) -> Any:
        text = embedded(list(prompts), test_run, model, provider)
        require_same_bundle(test_run, text)
        return text.X

    with mistakes_of("fused"):
        result = fused_runs(
            train_run, test_run, read_map(map_name), strategy, embed, clusters_per_class=clusters_per_class
        )
    report({**result, "train": described(train_run), "test": described(test_run)}, output, as_json)


def numbers(text: str, flag: str) -> list[float]:
    try:
        return [float(part) for part in text.split(",")]
    except ValueError as error:
        raise ClipmillError(f"{flag} {text}: must be numbers with commas between") from error


def comparable_runs(train: str, test: str) -> tuple[ImageEmbeddings, ImageEmbeddings]:
    from probes.embeddings import load_run, require_same_bundle, require_same_classes

    train_run, test_run = load_run(train), load_run(test)
    require_same_bundle(train_run, test_run)
    require_same_classes(train_run, test_run)
    return train_run, test_run


def text_embeddings(prompts: str, run: ImageEmbeddings | RunBlocks, model: str | None, provider: str) -> TextEmbeddings:
    """The prompts of a table, or of a set or file embedded by the bundle that made the run."""
    from probes.embeddings import load_text_table, require_same_bundle
    from probes.prompts import read_prompts

    if Path(prompts).suffix in (".parquet", ".arrow"):
        text = load_text_table(prompts)
    else:
        text = embedded(read_prompts(prompts), run, model, provider)
    require_same_bundle(run, text)
    return text


def class_embeddings(
    templates: Sequence[str], run: ImageEmbeddings, model: str | None, provider: str
) -> TextEmbeddings:
    """One embedding a class of the run: of its prompt, or the mean of several."""
    from probes.embeddings import TextEmbeddings, require_same_bundle
    from probes.prompts import fill_template
    from probes.zero_shot import ensemble

    names = run.decided()
    filled = [fill_template(template, names) for template in templates or (DEFAULT_TEMPLATE,)]
    text = embedded([prompt for prompts in filled for prompt in prompts], run, model, provider)
    require_same_bundle(run, text)
    return TextEmbeddings(text.prompts, ensemble(text.X.reshape(len(filled), len(names), -1)), text.bundle)


def embedded(prompts: list[str], run: ImageEmbeddings | RunBlocks, model: str | None, provider: str) -> TextEmbeddings:
    from engine.text import embed_prompts
    from probes.embeddings import TextEmbeddings

    bundle = bundle_of(run, model)
    return TextEmbeddings(prompts, embed_prompts(bundle, prompts, provider, started=say), bundle.fingerprint)


def bundle_of(run: ImageEmbeddings | RunBlocks, model: str | None) -> Bundle:
    """The one that embeds a run's prompts: --model, else the bundle under models/ that has the name of the run's."""
    from engine.bundle import find_bundle

    return find_bundle(model or run.bundle_name)


def described(run: ImageEmbeddings) -> dict[str, Any]:
    return {"run": str(run.path), "dataset": run.dataset, "split": run.split, "bundle": run.bundle}


@contextlib.contextmanager
def mistakes_of(name: str) -> Iterator[None]:
    """Probes are scikit-learn's kind and raise ValueError for arrays that they cannot use."""
    try:
        yield
    except ValueError as error:
        raise ClipmillError(f"probe {name}: {error}") from error


def report(result: dict[str, Any], output: Path | None, as_json: bool) -> None:
    from engine.files import write_json

    if output:
        write_json(output, result)
    if as_json:
        click.echo(json.dumps(result, ensure_ascii=False))
        return
    for name, value in result.items():
        if isinstance(value, float):
            click.echo(f"{name:<16} {value:.4f}")
        elif isinstance(value, (str, int)):
            click.echo(f"{name:<16} {value}")
        elif value is None or name in ("best", "worst", "first", "missing_classes"):
            click.echo(f"{name:<16} {', '.join(map(str, value or ())) or 'none'}")
    for name in ("per_class", "points", "sweep", "curve", "validation"):
        if result.get(name):
            click.echo(f"\n{name.replace('_', ' ')}")
            columns = {column: column.replace("_", " ") for column in result[name][0]}
            table(
                [{k: f"{v:.6g}" if isinstance(v, float) else v for k, v in row.items()} for row in result[name]],
                columns,
                False,
            )


# study --------------------------------------------------------------------------------------------------------------


@main.command()
@click.argument("name", type=click.Choice(STUDIES))
@click.option(
    "--profile",
    type=click.Choice(["sample", "paper"]),
    default="sample",
    show_default=True,
    help="The embedded sample and model in minutes, or the paper's datasets and model.",
)
@click.option("--only", metavar="ROW,...", help="Rows or sections to run.  [default: all]")
@click.option("--prompts", multiple=True, metavar="SET=FILE", help="Your own file in the place of a prompt set.")
@click.option("--model", metavar="BUNDLE", help="Bundle folder, or its name under models/.  [default: of the profile]")
@provider_option
@data_dir_option
@click.option("--no-download", is_flag=True, help="A row whose dataset is not there yet says so.")
@click.option(
    "--output",
    type=click.Path(file_okay=False, path_type=Path),
    help="Folder.  [default: studies/<name>-<profile>-<bundle>]",
)
@json_option
def study(
    name: str,
    profile: str,
    only: str | None,
    prompts: tuple[str, ...],
    model: str | None,
    provider: str,
    data_dir: Path | None,
    no_download: bool,
    output: Path | None,
    as_json: bool,
) -> None:
    """Recompute every table and figure of a paper, beside its published values.

    Missing runs are extracted to runs/, those that are there are used. Each row is kept as it finishes: the same
    command again does only what is not done. Needs the `study` extra.

    \b
    Example:
      python cli.py study thesis
      python cli.py study thesis --only temperature,vocabulary --prompts generic-99=mine.txt
      python cli.py study thesis --profile paper --provider cuda
    """
    from engine.bundle import find_bundle
    from engine.text import embed_prompts
    from probes.report import HEADER, table_rows, trend_lines, write_report
    from probes.study import PROFILES, Tools, load_study, run

    try:
        from probes.plots import draw
    except ModuleNotFoundError as error:
        raise ClipmillError(f"study needs {error.name}, which is not installed: pip install -e '.[study]'") from error
    chosen = load_study(name)
    names = [part.strip() for part in (only or "").split(",") if part.strip()]
    rows = chosen.chosen(names)
    replaced = dict(replacement(pair) for pair in prompts)
    for unused in replaced.keys() - {row.parameters.get("prompts") for row in rows}:
        raise ClipmillError(f"--prompts {unused}=...: none of the rows to run is on {unused}")
    bundle = find_bundle(model or PROFILES[profile], provider)
    folder = output or Path("studies") / f"{name}-{profile}-{bundle.name}"
    runs: dict[tuple[Source, str], ImageEmbeddings | ClipmillError] = {}
    embeddings: dict[tuple[str, ...], Any] = {}

    def run_of(source: Source, split: str) -> ImageEmbeddings:
        """Kept, and so is a failure: no row waits again for a download that did not come."""
        if (source, split) not in runs:
            try:
                runs[source, split] = study_run(bundle, source, split, provider, data_dir, not no_download)
            except ClipmillError as error:
                runs[source, split] = error
        found = runs[source, split]
        if isinstance(found, ClipmillError):
            raise found
        return found

    def embed(texts: Sequence[str]) -> Any:
        if tuple(texts) not in embeddings:
            embeddings[tuple(texts)] = embed_prompts(bundle, texts, provider)
        return embeddings[tuple(texts)]

    tools = Tools(
        run_of,
        embed,
        {
            "name": bundle.name,
            "fingerprint": bundle.fingerprint,
            "model": bundle.source.model,
            "precision": bundle.target.precision,
        },
        1 / bundle.architecture.logit_scale,
        replaced,
    )
    if profile == "paper":
        announce(bundle, rows, provider, data_dir, not no_download)
    results = run(chosen, profile, folder, tools, names, say)
    plots = draw(results, folder / "plots")
    report_file = write_report(results, plots, folder)
    if as_json:
        click.echo(json.dumps({"output": str(folder), **results}, ensure_ascii=False))
    else:
        table(list(table_rows(results)), {column: column for column in HEADER}, False)
        click.echo("\n" + "\n".join(trend_lines(results)))
    say(f"{report_file}, {folder / 'results.json'} and {len(plots)} plots")
    undone = [row for row in results["rows"] if row["status"] != "done" and row["data"]]
    if undone:
        missing = ", ".join(dict.fromkeys(row["needs"] for row in undone))
        raise ClipmillError(f"{len(undone)} of {len(results['rows'])} rows are not done: {missing}; see above why")


def study_run(
    bundle: Bundle, source: Source, split: str, provider: str, data_dir: Path | None, download: bool
) -> ImageEmbeddings:
    """A run that a study needs: the one that is there, else extracted, under the name that `extract` gives it."""
    from engine.datasets import dataset_table, open_dataset
    from engine.datasets.reduced import reduce, reduced_name
    from engine.datasets.subset import draw_classes
    from engine.manifest import holds_run_of
    from engine.stream import Settings
    from probes.embeddings import load_run

    dataset_name = reduced_name(source.name, source.pixels) if source.pixels else source.name
    slug = source.name + (f"-{source.classes}classes-seed{source.class_seed}" if source.classes else "")
    path = Path("runs") / f"{slug}{f'-{source.pixels}px' if source.pixels else ''}-{split}-{bundle.name}"
    drawn = None
    if source.classes:
        (count,) = (info.classes for info in dataset_table(data_dir) if info.name == source.name)
        drawn = draw_classes(count or 0, source.classes, source.class_seed)
    if not holds_run_of(path, bundle, dataset_name, split, drawn):
        classes = str(source.classes) if source.classes else None
        dataset = open_dataset(
            source.name,
            split,
            classes=classes,
            class_seed=source.class_seed,
            data_dir=data_dir,
            download=download,
        )
        dataset = reduce(dataset, source.pixels) if source.pixels else dataset
        say(f"extracting {source}, {split}, to {path}")
        try:
            run_extract(bundle, dataset, path, Settings(provider=provider))
        except ClipmillError as error:
            raise ClipmillError(f"cannot extract {source}, {split}: {error} (flags of `extract`)") from error
    return load_run(path)


def announce(bundle: Bundle, rows: Sequence[Row], provider: str, data_dir: Path | None, download: bool) -> None:
    """What a study on whole datasets will download, and about how long it takes here."""
    import tempfile

    from engine.datasets import dataset_table, open_dataset
    from engine.stream import Settings, extract
    from probes.classifiers import svm_seconds
    from probes.study import svm_fits

    known = {info.name: info for info in dataset_table(data_dir)}
    images = 0
    for source in {row.dataset for row in rows}:
        info = known[source.name]
        share = source.classes / (info.classes or 1) if source.classes else 1
        images += round(share * sum(count or 0 for count in info.splits.values()))
    for info in {row.dataset.name: known[row.dataset.name] for row in rows}.values():
        there = "is there" if info.cached else "will be downloaded" if download else "is not there"
        say(f"{info.name}: {there} ({info.what})")
    with tempfile.TemporaryDirectory() as folder:
        sample = open_dataset("cifar10-sample", "test", 64)
        summary = extract(bundle, sample, Path(folder) / "run", Settings(provider=provider))["summary"]
    speed = summary["images_per_second"]
    say(
        f"{images} images to embed where their runs are not there yet: about {images / speed / 60:.0f} min at "
        f"{speed:.0f} images/s"
    )
    if fits := svm_fits(rows):
        minutes = fits * svm_seconds(50_000) / 60
        say(f"{fits} SVMs: very roughly {minutes:.0f} min at 50,000 images and 512 dimensions each")


def replacement(pair: str) -> tuple[str, tuple[str, list[str]]]:
    """A prompt set, and the file in its place with its prompts."""
    from probes.prompts import prompt_sets, read_prompts

    name, equals, file = pair.partition("=")
    if not equals or name not in prompt_sets():
        raise ClipmillError(f"--prompts {pair}: must be SET=FILE, with one of {', '.join(prompt_sets())}")
    return name, (file, read_prompts(file))


# what there is ------------------------------------------------------------------------------------------------------


@main.group(invoke_without_command=True)
@data_dir_option
@json_option
@click.pass_context
def datasets(ctx: click.Context, data_dir: Path | None, as_json: bool) -> None:
    """List the datasets that `extract` takes, or get one.

    \b
    Example:
      python cli.py datasets
      python cli.py datasets get cifar100
    """
    if ctx.invoked_subcommand:
        return
    from engine.datasets import dataset_table

    rows = []
    for info in dataset_table(data_dir):
        row = vars(info) | {"splits": dict(info.splits), "cached": {True: "yes", False: "no", None: ""}[info.cached]}
        rows.append(row)
    columns = ("name", "splits", "classes", "image_size", "cached", "what", "source")
    table(rows, {name: name.replace("_", " ") for name in columns}, as_json)


@datasets.command("get")
@click.argument("name")
@data_dir_option
def get(name: str, data_dir: Path | None) -> None:
    """Download a named dataset, and check what is there.

    \b
    Example:
      python cli.py datasets get cifar100
    """
    from engine.datasets import get_dataset

    click.echo(get_dataset(name, data_dir))


@main.command()
@json_option
def models(as_json: bool) -> None:
    """List the bundles under models/, and what `export` takes.

    \b
    Example:
      python cli.py models
    """
    from engine.bundle import MODELS_FOLDER, load_bundle

    rows = []
    for path in sorted(MODELS_FOLDER.glob("*/bundle.json")):
        bundle = load_bundle(path.parent, verify=False)
        rows.append(
            {
                "bundle": str(path.parent),
                "model": bundle.source.model,
                "weights": "random" if bundle.source.random_weights else "trained",
                "provider": bundle.target.provider,
                "precision": bundle.target.precision,
                "dim": bundle.architecture.embedding_dim,
                "image_size": bundle.architecture.image_size,
                "min_cosine": min(bundle.certificate[tower]["min_cosine"] for tower in ("image", "text")),
            }
        )
    table(rows, {name: name for name in rows[0]} if rows else {}, as_json)
    say(f"{len(rows)} bundle(s) under {MODELS_FOLDER}/; `export --model` takes {EXPORTABLE}")


@main.command()
@json_option
def providers(as_json: bool) -> None:
    """Tell what --provider can take on this machine, what auto takes, and what the others lack.

    \b
    Example:
      python cli.py providers
    """
    from engine.diagnosis import diagnose

    found = diagnose()
    if as_json:
        click.echo(json.dumps(found))
        return
    build, driver = found["build"], found["driver"]
    packages = ", ".join(f"{name} {version}" for name, version in found["packages"].items())
    click.echo(
        f"package   {packages}, built for CUDA {build['cuda'] or '(none)'}, with {', '.join(build['providers'])}"
    )
    if found["mixed"]:
        click.echo(f"          {found['mixed']}")
    click.echo(f"driver    {driver.get('missing') or 'serves CUDA up to ' + driver['cuda']}")
    for device in found["devices"]:
        click.echo(f"device {device['id']}  {device['name']}, {device['free_bytes'] / 2**30:.1f} GiB free")
    for library, path in found["libraries"].items():
        click.echo(f"library   {library:<20} {path or 'not found'}")
    for provider, failure in found["providers"].items():
        click.echo(f"{provider:<9} {failure or 'comes up'}")
    click.echo(f"auto      takes {found['auto']}: {found['why']}")


@main.command()
@json_option
def prompts(as_json: bool) -> None:
    """List the built-in prompt sets.

    \b
    Example:
      python cli.py prompts
    """
    from probes.prompt_maps import prompt_maps
    from probes.prompts import prompt_sets, read_prompts

    sets = {name: read_prompts(name) for name in prompt_sets()}
    rows = [{"set": name, "prompts": len(texts), "first": texts[0]} for name, texts in sets.items()]
    table(rows, {"set": "set", "prompts": "prompts", "first": "first prompt"}, as_json)
    say(f"prompt maps, for `probe fused --map`: {', '.join(prompt_maps())}")


# bench --------------------------------------------------------------------------------------------------------------


@main.command(context_settings={"ignore_unknown_options": True, "allow_interspersed_args": False})
@click.argument("name", type=click.Choice(BENCHMARKS))
@click.argument("options", nargs=-1, type=click.UNPROCESSED, metavar="[ARGUMENTS]...")
def bench(name: str, options: tuple[str, ...]) -> None:
    """Run a benchmark of benchmarks/, or all of them; what follows the name goes to it.

    Each prints what it ran on, a table, and JSON as the last line. Needs the `export` extra.

    \b
    Example:
      python cli.py bench start
      python cli.py bench extract --images 64 --rounds 3
      python cli.py bench session --help
    """
    import subprocess
    from importlib.util import find_spec

    if missing := sorted(library for library in EXPORT_EXTRA if find_spec(library) is None):
        raise ClipmillError(f"bench needs {missing[0]}, which is not installed: pip install -e '.[export]'")
    script = Path(__file__).resolve().parent / "benchmarks" / f"{name}.py"
    sys.exit(subprocess.run([sys.executable, script, *options], check=False).returncode)


# output -------------------------------------------------------------------------------------------------------------


def say(message: str) -> None:
    """Progress and remarks, to stderr."""
    click.echo(message, err=True)


def emit(result: Mapping[str, Any], as_json: bool, main_field: str) -> None:
    """Data, to stdout: the whole object, or the one field that a script would want."""
    click.echo(json.dumps(result, ensure_ascii=False) if as_json else result[main_field])


def table(rows: Sequence[Mapping[str, Any]], columns: Mapping[str, str], as_json: bool) -> None:
    if as_json:
        click.echo(json.dumps(list(rows), ensure_ascii=False))
        return
    cells = [list(columns.values())] + [[cell(row[name]) for name in columns] for row in rows]
    widths = [max(len(line[column]) for line in cells) for column in range(len(columns))]
    for line in cells if rows else []:
        click.echo("  ".join(text.ljust(width) for text, width in zip(line, widths, strict=True)).rstrip())


def cell(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, tuple):
        return "x".join(map(str, value))
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {count}" if count else name for name, count in value.items())
    return str(value)


@contextlib.contextmanager
def progress_bar(length: int, label: str) -> Iterator[Callable[[int], None]]:
    """A bar on stderr where that is a terminal, else nothing."""
    if not sys.stderr.isatty():
        yield lambda _: None
        return
    with click.progressbar(length=length, label=label, file=sys.stderr, show_pos=True) as bar:
        yield bar.update


def local_path(output: str) -> Path:
    if "://" in output:
        raise ClipmillError(f"--output {output}: only local folders can be written so far")
    return Path(output).expanduser()


if __name__ == "__main__":
    main()
