"""A merge method is one file, one line, one row: registry, cards, configurations, `+soup=merge` and tests hold together."""

import json
import re
from pathlib import Path

import pytest
import torch
import yaml
from typer.testing import CliRunner

from soups.cli import app
from soups.errors import ConfigError, WeightsError
from soups.merging import METHODS, make_method, merge
from soups.merging.cards import card
from soups.merging.mergekit import merge_configuration
from soups.merging.mergekit.methods import SPECS, configuration_name, configuration_names, find_spec, skeleton
from soups.recipes import merge as merge_recipe
from soups.recipes.recipe import Candidate
from soups.stores import write_safetensors
from tests.merging import models
from tests.merging.settings import ROWS

every = pytest.mark.parametrize("name", METHODS)
HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A base and two experts, with statistics, on disk; and the same in memory."""
    folder = tmp_path_factory.mktemp("models")
    base, experts = models.family(2)
    write_safetensors(folder / "base.safetensors", base)
    for number, weights in enumerate(experts, 1):
        write_safetensors(folder / f"{number}.safetensors", weights)
        models.statistics(("gram", "fisher", "kfac_out", "second_moment"), weights).save(
            folder / f"{number}.statistics.safetensors"
        )
    return folder, base, experts


def filled(text, folder):
    text = re.sub(r"PATH/TO/MODEL_(\d)\.statistics", rf"{folder}/\1.statistics", text)
    return re.sub(r"PATH/TO/MODEL_(\d)", rf"{folder}/\1.safetensors", text).replace(
        "PATH/TO/BASE", f"{folder}/base.safetensors"
    )


def test_registry_files_and_rows_agree():
    assert {row.name for row in ROWS} == set(METHODS)
    modules = {entry.make.__module__.rpartition(".")[2] for entry in METHODS.values()}
    assert modules == {path.stem for path in (HERE.parents[1] / "soups/merging/methods").glob("*.py")} - {"__init__"}
    readme = (HERE.parents[1] / "soups/merging/README.md").read_text()
    assert "## Adding a method" in readme


@every
def test_a_card_says_everything(name):
    entry = METHODS[name]
    found = card(name, entry.make, entry.source)
    assert len(found.fails) > 40 and len(found.idea) > 60
    assert re.match(r"arXiv:\d{4}\.\d{5}|mergekit|PEFT|the authors' code|AdaMerging's code|.*19\d\d", found.source)
    assert {one.name: one.default for one in found.parameters} == entry.parameters
    assert all(len(one.text) > 3 for one in found.parameters)


@every
def test_the_skeleton_runs_and_is_the_method(name, files):
    folder, base, experts = files
    text = filled(skeleton(name), folder)
    assert "PATH" not in text
    found = merge_configuration(text)
    document = yaml.safe_load(text)
    count = len(document["models"]) - ("base_model" in document)
    options = {"base": base if "base_model" in document else None}
    if METHODS[name].statistics:
        options["statistics"] = [folder / f"{n}.statistics.safetensors" for n in range(1, count + 1)]
    parameters = {"weight": 1.0} if name in ("linear", "nuslerp", "multislerp") else {}
    preset = find_spec(configuration_name(name)).preset
    assert preset == name
    wanted = merge(make_method(name, **parameters), experts[:count], dtype=torch.float32, **options)
    assert set(found) == set(wanted)
    assert all(torch.equal(found[key], tensor) for key, tensor in wanted.items())


@every
def test_soup_merge_takes_it(name, files):
    _, base, experts = files
    most = METHODS[name].make().most
    pool = [Candidate(str(i), -float(i), lambda one=one: one) for i, one in enumerate(experts[: most or 2])]
    start = Candidate("base", 0.0, lambda: base)
    if METHODS[name].statistics:
        with pytest.raises(ConfigError, match=r"needs statistics \("):
            merge_recipe(pool, lambda weights: 0.0, start=start, method=name)
        return
    soup = merge_recipe(pool, lambda weights: 0.0, start=start, method=name)
    needs_base = METHODS[name].base == "required"
    wanted = merge(name, experts[: most or 2], base=base if needs_base else None)
    assert all(torch.equal(soup.weights[key], tensor) for key, tensor in wanted.items())


def test_a_bare_name_means_mergekits_form_and_paper_the_papers():
    assert find_spec("ties").preset == "ties.mergekit"
    assert find_spec("ties.paper").preset == "ties" == find_spec("ties.paper").preset
    assert find_spec("tsv").preset == "tsv"
    assert find_spec("tsv.paper") is None
    assert find_spec("linear").preset == "linear"
    assert set(SPECS) <= set(configuration_names())
    assert {find_spec(name).preset for name in configuration_names()} == set(METHODS)


def write(files, method, parameters="", model=""):
    folder = files[0]
    return (
        f"merge_method: {method}\nbase_model: {folder}/base.safetensors\nmodels:\n"
        f"  - model: {folder}/1.safetensors\n{model}  - model: {folder}/2.safetensors\n{parameters}"
    )


def test_parameters_of_a_configuration_reach_the_method(files):
    _, base, experts = files
    found = merge_configuration(write(files, "tsv", "parameters: {scale: 0.7, exclude: ['mat*']}\n"))
    wanted = merge("tsv", experts, base=base, scale=0.7, exclude=["mat*"])
    assert all(torch.equal(found[key], tensor) for key, tensor in wanted.items())
    text = write(files, "ties.paper", "parameters: {density: 0.4}\n", "    parameters: {weight: 0.25}\n")
    found = merge_configuration(text)
    wanted = merge("ties", experts, base=base, density=0.4, weight=[0.25, 1.0])
    assert all(torch.equal(found[key], tensor) for key, tensor in wanted.items())
    found = merge_configuration(write(files, "dare", "parameters: {density: 0.4}\n"), seed=5)
    wanted = merge("dare", experts, base=base, density=0.4, seed=5)
    assert all(torch.equal(found[key], tensor) for key, tensor in wanted.items())
    found = merge_configuration(write(files, "dare", "parameters: {seed: 9, density: 0.4}\n"), seed=5)
    wanted = merge("dare", experts, base=base, density=0.4, seed=9)
    assert all(torch.equal(found[key], tensor) for key, tensor in wanted.items())


def test_a_base_model_gives_a_method_without_one_its_configuration_only(files):
    _, _, experts = files
    found = merge_configuration(write(files, "median"))
    wanted = merge("median", experts)
    assert all(torch.equal(found[key], tensor) for key, tensor in wanted.items() if key != "steps")


@pytest.mark.parametrize(
    ("method", "parameters", "message"),
    [
        ("tvs", "", "merge_method 'tvs' is unknown; did you mean 'tsv'"),
        ("ties.papr", "", "did you mean 'ties.paper'"),
        ("tsv", "parameters: {scal: 2}\n", "tsv has no parameter 'scal'; did you mean 'scale'"),
        ("iso_cts", "parameters: {common: much}\n", "common: 'much' is no float"),
        ("consensus", "parameters: {agree: [1, x]}\n", "agree"),
        ("regmean", "", r"regmean needs statistics \(gram\) of every model; give .*1.safetensors its file"),
    ],
)
def test_mistakes_are_named(files, method, parameters, message):
    with pytest.raises(ConfigError, match=message):
        merge_configuration(write(files, method, parameters))


def test_statistics_of_a_configuration_are_checked(files):
    folder = files[0]
    swapped = write(files, "fisher", "", f"    statistics: {folder}/2.statistics.safetensors\n")
    swapped = swapped.replace("2.safetensors\n", f"2.safetensors\n    statistics: {folder}/1.statistics.safetensors\n")
    with pytest.raises(WeightsError, match="of other weights"):
        merge_configuration(swapped)
    with pytest.raises(ConfigError, match="Statistics were given, but TSV uses none"):
        merge_configuration(write(files, "tsv", "", f"    statistics: {folder}/1.statistics.safetensors\n"))


def test_the_command_prints_cards_and_skeletons():
    run = CliRunner()
    page = run.invoke(app, ["methods", "ties"]).output
    for part in ("arXiv:2306.01708", "When it fails:", "density", "default: 0.2", "merge_method: ties.paper"):
        assert part in page, part
    rows = json.loads(run.invoke(app, ["methods", "--json"]).output)
    assert set(rows) == set(METHODS)
    assert rows["regmean"]["statistics"] == ["gram"] and rows["ties"]["base"] == "required"
    assert yaml.safe_load(rows["tsv"]["configuration"])["merge_method"] == "tsv"


def test_state_says_which_weights_of_a_checkpoint_are_meant(tmp_path):
    sets = {"state_dict": {"w": torch.zeros(3)}, "ema": {"w": torch.ones(3)}}
    torch.save(sets, tmp_path / "run.pt")
    write_safetensors(tmp_path / "other.safetensors", {"w": torch.full((3,), 3.0)})
    text = (
        f"merge_method: linear\nmodels:\n  - {{model: {tmp_path}/run.pt, state: ema}}\n"
        f"  - model: {tmp_path}/other.safetensors\nparameters: {{weight: 1}}\n"
    )
    assert merge_configuration(text)["w"].tolist() == [2.0] * 3
    assert merge_configuration(text.replace(", state: ema", ", state: state_dict"))["w"].tolist() == [1.5] * 3


@pytest.mark.parametrize("method", ["linear", "task_arithmetic", "ties", "slerp", "sce", "pcb"])
def test_masks_of_infinities_stay_where_all_models_agree(method):
    mask = torch.full((40, 40), float("-inf")).triu(1)
    draw = torch.Generator().manual_seed(0)
    base = {"mask": mask, "w": torch.randn(50, 40, generator=draw)}
    experts = [{"mask": mask.clone(), "w": base["w"] + 0.1 * torch.randn(50, 40, generator=draw)} for _ in range(2)]
    experts = experts[: METHODS[method].make().most or 2]
    options = {"base": base} if METHODS[method].base != "none" else {}
    found = merge(method, experts, **options)
    assert torch.equal(found["mask"], mask)
    plain = [{"w": one["w"]} for one in experts]
    alone = merge(method, plain, **({"base": {"w": base["w"]}} if options else {}))
    assert torch.equal(found["w"], alone["w"]), "the mask has no part in what is found out about the rest"
    experts[0]["mask"][3, 3] = float("-inf")
    with pytest.raises(WeightsError, match="'mask'"):
        merge(method, experts, **options)


def test_mergekits_options_are_accepted(files, tmp_path):
    folder = files[0]
    config = tmp_path / "c.yml"
    config.write_text(filled(skeleton("ties.mergekit"), folder))
    flags = ["--clone-tensors", "-j", "1", "-v", "--gpu-rich", "--lazy-unpickle", "--read-to-gpu", "--multi-gpu"]
    result = CliRunner().invoke(app, ["merge", str(config), str(tmp_path / "out"), *flags])
    assert result.exit_code == 0, result.output
    assert (tmp_path / "out" / "model.safetensors").is_file()
