"""Copies are found: how many of which similarity, in both languages; nothing else is; in bounded memory."""

from __future__ import annotations

import random
import tracemalloc
import unicodedata
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st
from safetensors.numpy import load_file, save_file

from llmkit.config import Interrupted, UserError, validate
from llmkit.data import dedup
from llmkit.data.config import DataConfig, DedupConfig
from llmkit.data.dedup import EMPTY, REASONS, CopyFinder, Signatures, SignatureWriter, jaccard, minhash, normal_form

NEAR = DedupConfig(kind="near")
RNG = random.Random(0)
WORDS = {
    "zh": [chr(0x4E00 + i) for i in range(2500)],
    "en": ["".join(RNG.choices("abcdefghijklmnopqrstuvwxyz", k=RNG.randint(2, 9))) for _ in range(3000)],
}
JOIN = {"zh": "", "en": " "}


def sign(path: Path, texts: list[str], cfg: DedupConfig = NEAR) -> Path:
    writer = SignatureWriter(path, cfg)
    for text in texts:
        writer.add(text)
    writer.close()
    return path


def reasons(verdicts: np.ndarray) -> list[str]:
    return [REASONS[v] for v in verdicts]


def set_of(units: list[str], n: int = 5) -> set[tuple[str, ...]]:
    return {tuple(units[i : i + n]) for i in range(len(units) - n + 1)}


def near_copy(units: list[str], lang: str, similarity: float, rng: random.Random) -> list[str]:
    """Replaces units far from each other, each of which takes 5 of the n-grams with it."""
    n_grams = len(units) - 4
    n = round(n_grams * (1 - similarity) / (5 * (1 + similarity)))
    copy = list(units)
    for place in np.linspace(5, len(units) - 6, n).astype(int).tolist():
        copy[place] = rng.choice(WORDS[lang])
    return copy


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory) -> list[tuple[str, float, str, str]]:
    """1,000 pairs, 500 in each language, of similarities from 0.5 to 0.99: (language, true Jaccard, and what became
    of the original and of the copy)."""
    rng = random.Random(1)
    pairs, texts = [], []
    for lang in ("zh", "en"):
        for similarity in np.linspace(0.5, 0.99, 500):
            units = rng.choices(WORDS[lang], k=rng.randint(80, 400))
            copy = near_copy(units, lang, float(similarity), rng)
            a, b = set_of(units), set_of(copy)
            pairs.append((lang, len(a & b) / len(a | b)))
            texts += [JOIN[lang].join(units), JOIN[lang].join(copy)]
    path = sign(tmp_path_factory.mktemp("planted") / "a", texts)
    told = reasons(CopyFinder([], [[path]], NEAR).find()[0][0])
    return [(lang, j, *told[2 * i : 2 * i + 2]) for i, (lang, j) in enumerate(pairs)]


@pytest.mark.parametrize("lang", ["zh", "en"])
def test_recall_and_precision(planted: list[tuple[str, float, str, str]], lang: str) -> None:
    """At the threshold 98 % are found, a little above it all; below it none is removed, for the check is exact."""
    least = {0.5: 0.0, 0.6: 0.0, 0.7: 0.0, 0.75: 0.0, 0.8: 0.95, 0.85: 0.99, 0.9: 1.0, 1.0: 1.0}
    for low, high in pairwise(least):
        found = [copy for name, j, _, copy in planted if name == lang and low <= j < high]
        recall = sum(reason == "near_copy" for reason in found) / len(found)
        print(f"{lang} {low:.2f} <= J < {high:.2f}: {recall:.3f} of {len(found)}")
        assert len(found) > 25
        assert recall >= least[low] if low >= 0.8 else recall == 0, (low, recall)
    assert all(original == "" for _, _, original, _ in planted)


@pytest.mark.parametrize("threshold", [0.5, 0.7, 0.8, 0.9, 0.95, 1.0])
@pytest.mark.parametrize("permutations", [64, 128, 256])
def test_bands_follow_the_threshold(threshold: float, permutations: int) -> None:
    n, width = DedupConfig(kind="near", threshold=threshold, permutations=permutations).bands
    assert n * width <= permutations
    assert 1 - (1 - threshold**width) ** n >= 0.98 or width == 1
    wider = permutations // (width + 1) if width < permutations else 0
    assert 1 - (1 - threshold ** (width + 1)) ** wider < 0.98, "wider bands would do"


def test_minhash_estimates_jaccard() -> None:
    """Share of equal hashes = similarity, within what chance allows (Broder 1997)."""
    rng = np.random.default_rng(0)
    for similarity in (0.2, 0.5, 0.8, 0.95):
        n_both = round(600 * 2 * similarity / (1 + similarity))
        shares = []
        for _ in range(40):
            pool = rng.choice(1 << 32, 1200, replace=False).astype(np.uint32)
            a, b = np.sort(pool[:600]), np.sort(pool[600 - n_both : 1200 - n_both])
            assert jaccard(a, b) == len(set(a.tolist()) & set(b.tolist())) / len(set(a.tolist()) | set(b.tolist()))
            shares.append(float(np.mean(minhash(a, 128) == minhash(b, 128))))
        deviation = (similarity * (1 - similarity) / (128 * 40)) ** 0.5
        assert abs(np.mean(shares) - similarity) < 4 * deviation + 0.001


def test_minhash_does_not_depend_on_the_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    grams = np.sort(np.random.default_rng(0).integers(0, 1 << 32, 3000, dtype=np.uint32))
    whole = minhash(grams, 128)
    functions = zip(*(p.ravel().tolist() for p in dedup._permutations(128)), strict=True)
    naive = [min((f * g + t) % (1 << 32) for g in grams.tolist()) for f, t in functions]
    assert whole.tolist() == naive
    monkeypatch.setattr(dedup, "_BLOCK", 7)
    assert minhash(grams, 128).tolist() == naive


SMALL = st.lists(st.integers(0, 2**32 - 1), max_size=30).map(lambda x: np.array(sorted(set(x)), np.uint32))


@given(a=SMALL, b=SMALL)
@settings(max_examples=200, deadline=None)
def test_jaccard(a: np.ndarray, b: np.ndarray) -> None:
    sa, sb = set(a.tolist()), set(b.tolist())
    assert jaccard(a, b) == jaccard(b, a) == (len(sa & sb) / len(sa | sb) if sa | sb else 1.0)


# --- what a copy is ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["exact", "near"])
def test_case_width_blanks_and_accents_make_no_difference(tmp_path: Path, kind: str) -> None:
    originals = ["The  Mill stands by the café.", "第１章：Ｈｅｌｌｏ　世界，你好", "x"]
    copies = [unicodedata.normalize("NFD", originals[0]).upper(), "第1章:hello 世界,你好", " X\n"]
    other = ["The mill stands by the cafe.", "第2章：Hello 世界，你好", "y"]
    for a, b, c in zip(originals, copies, other, strict=True):
        assert normal_form(a).tolist() == normal_form(b).tolist() != normal_form(c).tolist()
    cfg = DedupConfig(kind=kind)
    found = CopyFinder([], [[sign(tmp_path / "a", [*originals, *copies, *other, "", ""], cfg)]], cfg).find()[0][0]
    assert reasons(found) == [""] * 3 + ["exact_copy"] * 3 + [""] * 4 + ["exact_copy"]


def document(seed: int, n: int = 60) -> str:
    return " ".join(random.Random(seed).choices(WORDS["en"], k=n))


def test_the_first_one_stays_in_the_order_of_the_sources(tmp_path: Path) -> None:
    """Across units and sources; validation text stays, and its copies in the training text go."""
    d = [document(i) for i in range(8)]
    near = [t + " indeed" for t in d]
    held_out = [sign(tmp_path / "h0", [d[0], near[0], d[0]]), sign(tmp_path / "h1", [d[1]])]
    one = [sign(tmp_path / "a0", [d[2], near[1], d[3]]), sign(tmp_path / "a1", [near[2], d[0].upper(), d[4]])]
    two = [sign(tmp_path / "b0", [near[3], d[4], d[5], near[5], d[1]])]
    expected = [
        [["", "copy_of_held_out", ""], ["near_copy", "copy_of_held_out", ""]],
        [["near_copy", "exact_copy", "", "near_copy", "copy_of_held_out"]],
    ]
    found = CopyFinder([held_out], [one, two], NEAR).find()
    assert [[reasons(v) for v in units] for units in found] == expected
    # What a source keeps depends on earlier ones only.
    assert [reasons(v) for v in CopyFinder([held_out], [one], NEAR).find()[0]] == expected[0]


def test_what_is_left_out_is_like_something_that_stays(tmp_path: Path) -> None:
    """No chains: of A ~ B ~ C, where A and C differ, only B goes."""
    units = document(0, 100).split()
    chain = [units]
    for i in range(5):
        after = list(chain[-1])
        after[10 + 18 * i] = f"w{i}"
        chain.append(after)
    texts = [" ".join(u) for u in chain]
    similar = [[len(set_of(a) & set_of(b)) / len(set_of(a) | set_of(b)) for b in chain] for a in chain]
    assert similar[0][1] > 0.85 > similar[0][2] > 0.8 > similar[0][3]
    found = CopyFinder([], [[sign(tmp_path / "a", texts)]], NEAR).find()[0][0]
    kept = [i for i, v in enumerate(found) if not v]
    assert kept == [0, 3]
    for i, v in enumerate(found):
        assert not v or max(similar[i][k] for k in kept if k < i) >= 0.8


def test_short_documents_are_not_all_alike(tmp_path: Path) -> None:
    """Fewer units than an n-gram: one n-gram; none at all, as in a line of signs: no near copy."""
    texts = ["你好", "你们", "a b", "b a", "!!!", "???", "你好！", "。。。"]
    found = reasons(CopyFinder([], [[sign(tmp_path / "a", texts)]], NEAR).find()[0][0])
    assert found == [""] * 6 + ["near_copy", ""]


def test_empty_and_dropped_documents_take_no_part(tmp_path: Path) -> None:
    writer = SignatureWriter(tmp_path / "a", NEAR)
    rule = REASONS.index("min_chars")
    writer.skip(EMPTY)
    writer.add("one two three four five six")
    writer.skip(rule)
    writer.skip(EMPTY)
    writer.add("one two three four five six")
    writer.close()
    assert CopyFinder([], [[tmp_path / "a"]], NEAR).find()[0][0].tolist() == [
        0, 0, rule, 0, REASONS.index("exact_copy"),
    ]  # fmt: skip


@given(data=st.data())
@settings(max_examples=40, deadline=None)
def test_against_all_pairs(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    """With one hash a band every pair that has anything in common is compared: the same as comparing all."""
    folder = tmp_path_factory.mktemp("pairs")
    cfg = DedupConfig(kind="near", threshold=0.3, ngram=1, permutations=64)
    letters = st.lists(st.sampled_from("abcdef"), min_size=1, max_size=6).map(" ".join)
    files = data.draw(st.lists(st.lists(letters, max_size=6), min_size=2, max_size=4))
    paths = [sign(folder / str(i), texts, cfg) for i, texts in enumerate(files)]
    found = CopyFinder([paths[:1]], [paths[1:]], cfg).find()[0]
    exact = dict.fromkeys(files[0], "copy_of_held_out")
    kept = [(set(t.split()), "copy_of_held_out") for t in files[0]]
    expected = []
    for text in [t for texts in files[1:] for t in texts]:
        reason = exact.get(text, "")
        if not reason:
            exact[text] = "exact_copy"
            mine = set(text.split())
            reason = next((why for other, why in kept if len(mine & other) / len(mine | other) >= 0.3), "")
            if not reason:
                kept.append((mine, "near_copy"))
        expected.append(reason)
    assert cfg.bands == (64, 1)
    assert [r for v in found for r in reasons(v)] == expected


# --- bounds -----------------------------------------------------------------------------------------------------------


def synthetic(folder: Path, n: int, n_files: int, common: int) -> list[Path]:
    """Signature files of documents that agree with one of the file before in `common` bands."""
    rng = np.random.default_rng(0)
    paths, before = [], None
    for i in range(n_files):
        bands = rng.integers(0, 1 << 63, (NEAR.bands[0], n), np.uint64)
        if before is not None:
            bands[:common] = before[:common]
        before = bands
        grams = np.sort(rng.integers(0, 1 << 32, (n, 8), np.uint32), axis=1)
        arrays = {
            "digests": rng.integers(0, 1 << 63, (n, 2), np.uint64),
            "bands": bands,
            "sizes": np.full(n, 8, np.uint32),
            "grams": grams.reshape(-1),
            "verdicts": np.zeros(n, np.uint8),
        }
        paths.append(folder / f"{i}.signatures")
        save_file(arrays, paths[-1])
    return paths


@pytest.mark.parametrize(("n", "common", "most"), [(100_000, 0, 50), (5_000, 2, 50 + 2 * 40)])
def test_memory_is_bounded(tmp_path: Path, n: int, common: int, most: int) -> None:
    """About 40 bytes a document, and about 30 for every band in which it agrees with another."""
    paths = synthetic(tmp_path, n // 4, 4, common)
    finder = CopyFinder([], [paths], NEAR)
    tracemalloc.start()
    try:
        found = finder.find()
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert not any(v.any() for v in found[0])
    assert peak < most * n + 200_000, peak / n


def test_many_files_are_not_open_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dedup, "_OPEN", 2)
    texts = [document(i) for i in range(6)]
    paths = [sign(tmp_path / str(i), [t, t + " indeed"]) for i, t in enumerate(texts)]
    paths += [sign(tmp_path / f"again{i}", [t + " so"]) for i, t in enumerate(texts)]
    finder = CopyFinder([], [paths], NEAR)
    found = [reasons(v) for v in finder.find()[0]]
    assert found == [["", "near_copy"]] * 6 + [["near_copy"]] * 6
    assert finder._mapped.cache_info().currsize <= 2


def test_the_file_is_safetensors_and_the_same_however_it_was_spooled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = [document(i) for i in range(9)]
    whole = load_file(sign(tmp_path / "a", texts))
    monkeypatch.setattr(dedup, "_SPOOL", 100)
    monkeypatch.setattr(dedup, "_DOCUMENTS", 4)
    spooled = load_file(sign(tmp_path / "b", texts))
    assert {k: v.tolist() for k, v in whole.items()} == {k: v.tolist() for k, v in spooled.items()}
    assert whole["bands"].shape == (NEAR.bands[0], 9) and whole["sizes"].tolist() == [56] * 9


def test_damage_and_signals(tmp_path: Path) -> None:
    path = sign(tmp_path / "a", [document(0), document(0)])
    with pytest.raises(Interrupted, match="run again to go on"):
        CopyFinder([], [[path]], NEAR, should_stop=lambda: True).find()
    content = path.read_bytes()
    for damaged in (content[:-1], content[:4], b"", b"\xff" * 100, content[:8] + b"[" + content[9:]):
        path.write_bytes(damaged)
        with pytest.raises(UserError, match="damaged: delete it and prepare again"):
            Signatures(path)


def test_in_a_recipe() -> None:
    def read(value: object) -> DedupConfig:
        return validate(DataConfig, {"path": "a", "dedup": value}).dedup

    assert read("near") == read({"kind": "near"}) == NEAR and read({}).kind is None
    with pytest.raises(UserError, match="expected 'exact' or 'near'"):
        read("fuzzy")
    with pytest.raises(UserError, match="threshold"):
        read({"threshold": 0.1})
