"""Which of a repository's GGUF files a name stands for."""

from __future__ import annotations

import pytest

from api.model.gguf_choice import ChoiceError, choose_gguf, part_names
from api.model.hub import HubName, parse_hub_name

SPLIT = [f"BF16/model-BF16-0000{number}-of-00003.gguf" for number in (1, 2, 3)]
FILES = [
    "README.md", "mmproj-F16.gguf", "imatrix.gguf", "model-Q4_K_M.gguf", "model-q8_0.gguf", "model-UD-Q6_K.gguf",
    "model-UD-Q4_K_XL.gguf", "model-IQ4_XS.gguf", *reversed(SPLIT),
]  # fmt: skip


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("org/model", HubName("org/model")),
        ("org/model:Q4_K_M", HubName("org/model", tag="Q4_K_M")),
        ("org/model/sub/x-Q8_0.gguf", HubName("org/model", file="sub/x-Q8_0.gguf")),
        ("hf.co/org/model:Q8_0", HubName("org/model", tag="Q8_0")),
        ("https://huggingface.co/org/model/", HubName("org/model")),
        ("https://modelscope.cn/models/org/model", HubName("org/model")),
        ("org/model/extra", None),
        ("model", None),
        ("org/mo del", None),
        ("org/model:", None),
    ],
)
def test_names_of_models_on_a_hub(name: str, expected: HubName | None) -> None:
    assert parse_hub_name(name) == expected


@pytest.mark.parametrize(
    ("wanted", "expected"),
    [
        (None, ["model-Q4_K_M.gguf"]),
        ("q4_k_m", ["model-Q4_K_M.gguf"]),
        ("Q8_0", ["model-q8_0.gguf"]),
        ("Q6_K", ["model-UD-Q6_K.gguf"]),
        ("UD-Q4_K_XL", ["model-UD-Q4_K_XL.gguf"]),
        ("bf16", SPLIT),
        ("model-IQ4_XS.gguf", ["model-IQ4_XS.gguf"]),
        (SPLIT[1], SPLIT),
        ("model-BF16", SPLIT),
    ],
)
def test_choices(wanted: str | None, expected: list[str]) -> None:
    assert choose_gguf(FILES, wanted) == expected


def test_the_only_model_needs_no_name() -> None:
    assert choose_gguf(["a/weights.gguf", "mmproj-a.gguf"], None) == ["a/weights.gguf"]
    assert choose_gguf(SPLIT, None) == SPLIT


@pytest.mark.parametrize(
    ("files", "wanted", "message"),
    [
        (["README.md", "mmproj-F16.gguf"], None, "no GGUF files"),
        (FILES, "Q5_K", "no GGUF file for 'Q5_K'; it has BF16, IQ4_XS, Q4_K_M, Q8_0, UD-Q4_K_XL, UD-Q6_K"),
        (["x-Q8_0.gguf", "x-Q2_K.gguf"], None, "choose one of its GGUF files; it has Q2_K, Q8_0"),
        (["a-Q8_0.gguf", "b-Q8_0.gguf"], "Q8_0", "several GGUF files for 'Q8_0'; it has a-Q8_0.gguf, b-Q8_0.gguf"),
        (["one.gguf", "two.gguf"], None, "choose one of its GGUF files; it has one.gguf, two.gguf"),
        (SPLIT[:2], "BF16", f"model-BF16 is incomplete: {SPLIT[2]} is missing"),
        ([f"x{number}.gguf" for number in range(60)], None, " and 20 more"),
    ],
)
def test_what_cannot_be_chosen(files: list[str], wanted: str | None, message: str) -> None:
    with pytest.raises(ChoiceError) as caught:
        choose_gguf(files, wanted)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_names_of_parts() -> None:
    assert part_names("x-00002-of-00002.gguf") == ["x-00001-of-00002.gguf", "x-00002-of-00002.gguf"]
    for name in ("x.gguf", "x-00003-of-00002.gguf", "x-00000-of-00002.gguf", "x-2-of-3.gguf"):
        assert part_names(name) == [name]
