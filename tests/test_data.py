"""Lists of pairs, splits, pair datasets and samplers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from monai.bundle import ConfigParser
from monai.data import DataLoader, MetaTensor
from monai.transforms import Compose, Lambdad, RandLambdad
from torch.utils.data import DataLoader as TorchDataLoader

from equireg.augmentation import RandShiftd
from equireg.data import PairDataset, PairSampler, SyntheticPairDataset, ordered_pair, pair_dataset
from equireg.lists import decathlon_subjects, load_pairs, require_pairs, subjects
from equireg.transforms import StackPaird


@pytest.fixture
def images(tmp_path: Path) -> Path:
    (tmp_path / "scans").mkdir()
    for name in ("a", "b", "c"):
        (tmp_path / "scans" / f"{name}.nii").touch()
    return tmp_path


def write(path: Path, content: Any) -> Path:
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


def test_load_pairs_reads_json_and_csv_alike(images: Path) -> None:
    rows = [
        {"moving": "scans/a.nii", "fixed": "scans/b.nii", "moving_label": "scans/c.nii", "name": "one"},
        {"moving": str(images / "scans" / "b.nii"), "fixed": "scans/a.nii", "moving_label": None, "name": "two"},
    ]
    table = "\ufeffmoving, fixed,moving_label,name\n" + "\n".join(
        ",".join([row["moving"], row["fixed"], row["moving_label"] or "", row["name"]]) for row in rows
    )
    expected = [
        {"moving": "a", "fixed": "b", "moving_label": "c"},
        {"moving": "b", "fixed": "a"},
    ]
    for path in (
        write(images / "flat.json", rows),
        write(images / "named.json", {"pairs": rows}),
        write(images / "table.csv", table),
    ):
        pairs = load_pairs(path)
        assert [pair.pop("name") for pair in pairs] == ["one", "two"]
        wanted = [{key: str(images / "scans" / f"{name}.nii") for key, name in row.items()} for row in expected]
        assert pairs == wanted


def test_load_pairs_takes_one_file_per_channel(images: Path) -> None:
    path = write(
        images / "p.json", [{"moving": ["scans/a.nii", "scans/b.nii"], "fixed": ["scans/b.nii", "scans/c.nii"]}]
    )
    assert [Path(name).name for name in load_pairs(path)[0]["fixed"]] == ["b.nii", "c.nii"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("p.json", [], r"p.json': the list holds no pair"),
        ("p.csv", "moving,fixed\n", r"p.csv': the list holds no pair"),
        ("p.csv", "", r"p.csv': the list holds no pair"),
        ("p.json", "{nonsense", r"p.json' is not valid JSON"),
        ("p.json", {"list": []}, r"p.json': expected a list of dictionaries"),
        ("p.json", [{"moving": "scans/a.nii"}], r"p.json', pair 1: no entry for fixed"),
        ("p.csv", "moving\nscans/a.nii\n", r"p.csv', line 2: no entry for fixed, got \['moving'\]"),
        ("p.csv", "moving,fixed\nscans/a.nii\n", r"p.csv', line 2: expected 2 cells"),
        ("p.csv", "moving,fixed\na.nii,b.nii,c.nii\n", r"p.csv', line 2: expected 2 cells"),
        (
            "p.csv",
            "moving,fixed\nscans/a.nii,scans/b.nii\nscans/a.nii,x.nii\n",
            r"p.csv', line 3, fixed: 'x.nii' does not exist",
        ),
        ("p.json", [{"moving": 3, "fixed": "scans/a.nii"}], r"p.json', pair 1, moving: expected a file path, got 3"),
        ("p.txt", "", r"a .json or .csv file, got '.*p.txt'"),
    ],
)
def test_load_pairs_names_file_and_row(images: Path, name: str, content: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_pairs(write(images / name, content))


@pytest.mark.parametrize("name", ["absent.csv", "absent.json"])
def test_load_pairs_of_a_missing_list(tmp_path: Path, name: str) -> None:
    with pytest.raises(ValueError, match=f"no list of pairs '.*{name}'"):
        load_pairs(tmp_path / name)


def decathlon(folder: Path, count: int, label: bool = True) -> Path:
    (folder / "imagesTr").mkdir()
    (folder / "labelsTr").mkdir()
    entries = []
    for i in range(count):
        entry = {"image": f"./imagesTr/case_{i:03d}.nii.gz"}
        if label:
            entry["label"] = f"./labelsTr/case_{i:03d}.nii.gz"
        for name in entry.values():
            (folder / name).touch()
        entries.append(entry)
    write(folder / "dataset.json", {"training": entries, "test": ["./imagesTs/x.nii.gz"]})
    return folder


def test_decathlon_splits_are_disjoint_complete_and_independent_of_order(tmp_path: Path) -> None:
    decathlon(tmp_path, 30)
    splits = {name: decathlon_subjects(tmp_path, name) for name in ("training", "validation", "test")}
    assert {name: len(split) for name, split in splits.items()} == {"training": 21, "validation": 3, "test": 6}
    names = [Path(subject["image"]).name for split in splits.values() for subject in split]
    assert sorted(names) == [f"case_{i:03d}.nii.gz" for i in range(30)]
    assert names == [f"case_{i:03d}.nii.gz" for i in np.random.default_rng(seed=0).permutation(30)]
    for split in splits.values():
        assert all(Path(s["image"]).name == Path(s["label"]).name and Path(s["label"]).is_file() for s in split)
    content = json.loads((tmp_path / "dataset.json").read_text())
    content["training"].reverse()
    write(tmp_path / "dataset.json", content)
    assert decathlon_subjects(tmp_path, "test") == splits["test"]


def test_decathlon_small_and_unlabeled(tmp_path: Path) -> None:
    decathlon(tmp_path, 6, label=False)
    for split in ("training", "validation", "test"):
        found = decathlon_subjects(tmp_path, split)
        assert len(found) == 2 and all(set(subject) == {"image"} for subject in found)


def test_decathlon_says_what_is_wrong(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="holds no dataset.json"):
        decathlon_subjects(tmp_path, "training")
    with pytest.raises(ValueError, match="split of .* got 'train'"):
        decathlon_subjects(tmp_path, "train")
    for content, message in [
        ("{", "not valid JSON"),
        ([], "expected 'training' to be a list"),
        ({"training": ["a.nii"]}, "expected 'training' to be a list"),
        ({"training": [{"image": "a.nii"}] * 5}, "at least 6 subjects, two for each split, got 5"),
        ({"training": [{"image": f"{i}.nii"} for i in range(6)]}, "image of '.*nii': '.*nii' does not exist"),
    ]:
        write(tmp_path / "dataset.json", content)
        with pytest.raises(ValueError, match=message):
            decathlon_subjects(tmp_path, "training")


def test_subjects_without_a_folder_mean_synthetic_data(tmp_path: Path) -> None:
    assert subjects("", "training") is subjects(None, "test") is None
    decathlon(tmp_path, 10)
    assert subjects(tmp_path, "test") == decathlon_subjects(tmp_path, "test")


def test_decathlon_reads_real_hippocampi(shared_data: Path) -> None:
    folder = shared_data / "Task04_Hippocampus"
    if not folder.is_dir():
        pytest.skip(f"needs {folder}")
    sizes = [len(decathlon_subjects(folder, split)) for split in ("training", "validation", "test")]
    assert sizes == [140, 20, 40]


@pytest.mark.parametrize("count", [2, 3, 7])
def test_ordered_pair_is_a_bijection_without_self_pairs(count: int) -> None:
    pairs = [ordered_pair(k, count) for k in range(count * (count - 1))]
    assert sorted(pairs) == [(i, j) for i in range(count) for j in range(count) if i != j]
    for index in (-1, count * (count - 1)):
        with pytest.raises(ValueError, match="ordered_pair expects an index"):
            ordered_pair(index, count)


def tensors(count: int, labels: bool = True) -> list[dict[str, torch.Tensor]]:
    people = [{"image": torch.full((1, 4, 4), float(i))} for i in range(count)]
    if labels:
        for i, person in enumerate(people):
            person["label"] = torch.full((1, 4, 4), 10 + i)
    return people


def test_pair_dataset_pairs_images_with_their_labels() -> None:
    dataset = PairDataset(tensors(4))
    assert len(dataset) == 12
    seen = set()
    for item in dataset:
        moving, fixed = int(item["moving"].max()), int(item["fixed"].max())
        assert (item["moving_label"] == 10 + moving).all() and (item["fixed_label"] == 10 + fixed).all()
        seen.add((moving, fixed))
    assert len(seen) == 12 and all(moving != fixed for moving, fixed in seen)
    assert torch.equal(dataset[-1]["moving"], dataset[11]["moving"])
    with pytest.raises(IndexError, match="Pair 12 of 12"):
        dataset[12]
    assert len(dataset[2:5]) == 3


def test_pair_dataset_gives_labels_only_if_both_have_them() -> None:
    people = tensors(3)
    del people[2]["label"]
    for item in PairDataset(people):
        both = max(float(item["moving"].max()), float(item["fixed"].max())) < 2
        assert ("moving_label" in item) == both == ("fixed_label" in item)


def test_pair_dataset_draws_a_fixed_subset() -> None:
    people = [{"image": i} for i in range(9)]
    one, same, other = (PairDataset(people, num_pairs=20, seed=s) for s in (3, 3, 4))
    pairs = [tuple(item.values()) for item in one]
    assert len(one) == 20 == len(set(pairs))
    assert pairs == [tuple(item.values()) for item in same] != [tuple(item.values()) for item in other]
    assert len(PairDataset(people, num_pairs=1000)) == 72  # no more than there are


def test_pair_dataset_loads_once_and_protects_its_cache() -> None:
    calls = []

    def load(value: float) -> MetaTensor:
        calls.append(value)
        return MetaTensor(torch.full((1, 2, 2), float(value)))

    people = [{"image": float(i)} for i in range(3)]
    add = RandLambdad("moving", lambda x: x.add_(100), prob=1.0)
    dataset = PairDataset(people, load=Compose(Lambdad("image", load)), transform=add)
    assert calls == []  # cheap to construct
    for _ in range(2):
        assert [float(item["moving"].max()) for item in dataset] == [100, 100, 101, 101, 102, 102]
        assert [float(item["fixed"].max()) for item in dataset] == [1, 2, 0, 2, 0, 1]
    assert sorted(calls) == [0.0, 1.0, 2.0]
    eager = PairDataset(people, load=Compose(Lambdad("image", load)), cache_rate=0.0)
    _ = eager[0], eager[0]
    assert len(calls) == 3 + 4
    assert people == [{"image": 0.0}, {"image": 1.0}, {"image": 2.0}]


def test_pair_dataset_says_what_it_expects() -> None:
    with pytest.raises(ValueError, match="at least two subjects to make a pair, got 1"):
        PairDataset(tensors(1))
    with pytest.raises(ValueError, match="subjects with an 'image', got {'label': 1} as number 1"):
        PairDataset([{"image": 0}, {"label": 1}])
    with pytest.raises(ValueError, match="num_pairs to be None or at least 1, got 0"):
        PairDataset(tensors(2), num_pairs=0)


def test_synthetic_items_are_a_function_of_seed_and_index() -> None:
    one, same, other = (SyntheticPairDataset(2, (48, 40), seed=s) for s in (1, 1, 2))
    assert len(one) == 1_000_000
    _ = same[3]  # what was drawn before does not matter
    for index in (0, 999_999):
        first, again, different = one[index], same[index], other[index]
        assert set(first) == {"moving", "fixed", "moving_label", "fixed_label"}
        assert all(torch.equal(first[key], again[key]) for key in first)
        assert not torch.equal(first["moving"], different["moving"])
    assert not torch.equal(one[0]["moving"], one[1]["moving"])
    assert torch.equal(one[-1]["fixed"], one[999_999]["fixed"])
    with pytest.raises(IndexError):
        one[1_000_000]


def test_synthetic_dataset_says_what_it_expects() -> None:
    for arguments, message in [
        ((2, (32, 32, 32)), "2 or 3 sizes, got 2 dimensions"),
        ((4, 32), "2 or 3 sizes, got 4 dimensions"),
        ((2, 32, 0), "length >= 1"),
    ]:
        with pytest.raises(ValueError, match=message):
            SyntheticPairDataset(*arguments)
    with pytest.raises(ValueError, match="got 'cells'"):
        SyntheticPairDataset(2, 32, kind="cells")


def test_pair_dataset_function_chooses_by_the_data() -> None:
    synthetic = pair_dataset(
        None, None, StackPaird(), 3, (24, 26, 28), num_pairs=4, seed=5, max_shift=1, kind="vessels"
    )
    assert isinstance(synthetic, SyntheticPairDataset) and len(synthetic) == 4
    assert synthetic[0]["image"].shape == (2, 24, 26, 28)
    real = pair_dataset(tensors(3), None, StackPaird(), 2, 32, num_pairs=4)
    assert isinstance(real, PairDataset) and len(real) == 4 and real[0]["image"].shape == (2, 4, 4)
    assert len(pair_dataset(None, None, None, 2, 40)) == 1_000_000
    with pytest.raises(ValueError, match="at least two subjects to make a pair, got 0"):
        pair_dataset([], None, None, 2, 40)  # what MONAI Label hands over where nothing is labeled


def test_pair_sampler_is_seeded_and_goes_on() -> None:
    dataset = SyntheticPairDataset(2, 40)
    one, same = (PairSampler(dataset, 50, seed=s) for s in (0, 0))
    first, second = list(one), list(one)
    assert len(first) == 50 and first != second
    assert [first, second] == [list(same), list(same)]
    assert first != list(PairSampler(dataset, 50, seed=1))
    torch.rand(3)  # the sampler has its own generator
    assert list(PairSampler(range(5), 50, seed=0)) == list(PairSampler(range(5), 50, seed=0))
    with pytest.raises(ValueError):
        PairSampler(dataset, 0)


def test_pair_sampler_goes_on_from_its_state() -> None:
    sampler, other = PairSampler(range(1000), 40), PairSampler(range(1000), 40, seed=5)
    list(sampler)
    other.load_state_dict(sampler.state_dict())
    assert list(other) == list(sampler)


def test_pairs_that_would_overwrite_each_other_are_refused() -> None:
    pairs = [{"moving": f"case{k}/t1.nii.gz", "fixed": "atlas.nii.gz"} for k in (1, 2)]
    with pytest.raises(ValueError, match="both be called t1_to_atlas: .*case1.*case2"):
        require_pairs(pairs)
    require_pairs(pairs[:1])
    # Suffixes are not part of the names of results, and one pair can be called what another is.
    for moving, fixed in [
        ("x/t1.png", "atlas.nii.gz"),
        ("t1.nii.gz", "y/atlas.mha"),
        (["t1.nii", "t2.nii"], "atlas.nii"),
    ]:
        with pytest.raises(ValueError, match="both be called t1_to_atlas"):
            require_pairs([pairs[0], {"moving": moving, "fixed": fixed}])
    with pytest.raises(ValueError, match="both be called a_to_b_to_c"):
        require_pairs([{"moving": "a_to_b.nii", "fixed": "c.nii"}, {"moving": "a.nii", "fixed": "b_to_c.nii"}])
    require_pairs([*pairs[:1], {"moving": "t1.v2.nii.gz", "fixed": "atlas.nii.gz"}])
    with pytest.raises(ValueError, match="no pair to register"):
        require_pairs([])


def test_workers_give_the_items_of_the_main_process() -> None:
    dataset = SyntheticPairDataset(2, (40, 44), length=6, transform=StackPaird())
    batches = list(TorchDataLoader(dataset, batch_size=3, num_workers=2))
    assert [tuple(batch["image"].shape) for batch in batches] == [(3, 2, 40, 44)] * 2
    for index, image in enumerate(torch.cat([batch["label"] for batch in batches])):
        assert torch.equal(image, dataset[index]["image"])


def test_workers_draw_different_augmentations_of_subjects() -> None:
    groups = [("moving", "moving_label"), ("fixed", "fixed_label")]
    people = [{"image": torch.eye(32)[None], "label": torch.eye(32)[None]} for _ in range(3)]
    dataset = PairDataset(people, transform=Compose([RandShiftd(groups, 9), StackPaird()]))
    loader = DataLoader(dataset, batch_size=1, num_workers=2)
    items = [batch["image"][0] for batch in loader]
    assert all(not torch.equal(a, b) for i, a in enumerate(items) for b in items[:i])


def test_datasets_and_samplers_are_built_by_configs(tmp_path: Path) -> None:
    config = {
        "dataset_dir": "",
        "dataset": {
            "_target_": "equireg.data.pair_dataset",
            "data": {"_target_": "equireg.lists.subjects", "dataset_dir": "@dataset_dir", "split": "training"},
            "load": None,
            "transform": {"_target_": "Compose", "transforms": [{"_target_": "equireg.transforms.StackPaird"}]},
            "spatial_dims": 2,
            "shape": [40, 40],
            "num_pairs": 3,
        },
        "sampler": {"_target_": "equireg.data.PairSampler", "dataset": "@dataset", "num_samples": 5, "seed": 1},
    }
    dataset = ConfigParser(config).get_parsed_content("dataset")
    assert isinstance(dataset, SyntheticPairDataset) and dataset[0]["label"].shape == (2, 40, 40)
    assert len(ConfigParser(config).get_parsed_content("sampler")) == 5
    decathlon(tmp_path, 20)
    parser = ConfigParser({**config, "dataset_dir": str(tmp_path)})
    assert isinstance(parser.get_parsed_content("dataset"), PairDataset)
