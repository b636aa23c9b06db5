"Words and their numbers; captions in files."
import json, subprocess, sys, warnings

import pytest

from diffusion_model.captions import Vocabulary, read_captions, read_jsonl, split_words


@pytest.mark.parametrize("text, words", [
    ("A red star.", ["a", "red", "star"]), ("isn't ISN’T", ["isn't", "isn't"]), ("", []),
    ("'quoted' dogs'", ["quoted", "dogs"]), ("a_b-c/d", ["a", "b", "c", "d"]),
    ("3D 4k", ["3d", "4k"]),
    ("Ärger ÉTÉ", ["ärger", "été"]), ("e\u0301te\u0301", ["été"]), ("звезда 星", ["звезда", "星"])])
def test_words(text, words): assert split_words(text) == words


def test_the_most_frequent_words_in_any_order_of_captions():
    texts = ["b b b a", "c a", None, "", "d"]
    assert Vocabulary.of(texts, 6).words == ["b", "a", "c"]
    assert Vocabulary.of(texts[::-1], 6) == Vocabulary.of(texts, 6)
    assert Vocabulary.of(texts, 7).words == ["b", "a", "c", "d"] == Vocabulary.of(texts, 99).words
    assert Vocabulary.of(iter(texts), 4).words == ["b"]
    assert len(Vocabulary.of([None], 10)) == 3


def test_encoding():
    v = Vocabulary(["star", "red"])
    assert v.encode("Red, red star!", 5) == [4, 4, 3, 0, 0]
    assert v.encode("red star red", 2) == [4, 3]
    assert v.encode("moon", 2) == [1, 0]
    for nothing in (None, "", " ?! "): assert v.encode(nothing, 3) == [2, 0, 0]
    assert v.encode(None, 1) == [2]
    assert v.decode(v.encode("a red star", 6)) == "? red star" and v.decode([2, 0]) == ""
    assert v.unknown("The red, the moon") == ["the", "moon"]
    assert len(v) == 5 and v != Vocabulary(["red", "star"]) and v == Vocabulary(v.words)


@pytest.mark.parametrize("words", [["Red"], ["two words"], [""], ["a", "a"], ["it'"]])
def test_words_that_no_caption_gives(words):
    with pytest.raises(ValueError, match="vocabulary"): Vocabulary(words)


def test_limits():
    for most in (3, 0, -1):
        with pytest.raises(ValueError, match="data.caption_words: found"):
            Vocabulary.of(["a"], most)
    with pytest.raises(ValueError, match="data.caption_length: found 0"):
        Vocabulary([]).encode("a", 0)
    for n in (-1, 4):
        with pytest.raises(ValueError, match="allowed: 0 to 3"): Vocabulary(["a"]).decode([n])


# -- files
@pytest.fixture
def pictures(tmp_path):
    paths = [tmp_path/"a.png", tmp_path/"sub"/"b.png"]
    (tmp_path/"sub").mkdir()
    for path in paths: path.touch()
    return tmp_path, paths


def listed(root, *entries):
    (root/"captions.jsonl").write_text("\n".join(json.dumps(e) for e in entries), encoding="utf-8")


def test_one_file_for_all(pictures):
    root, paths = pictures
    listed(root, {"file": "sub/b.png", "caption": "ein größerer\u2028Stern"},
           {"file": "./a.png", "caption": "eins", "more": 1})
    with open(root/"captions.jsonl", "a") as f: f.write("\n\n  \n")
    assert read_captions(root, paths) == ["eins", "ein größerer\u2028Stern"]
    (root/"a.txt").write_text("not this")
    assert read_captions(str(root), paths)[0] == "eins"


def test_a_mark_of_the_byte_order_and_raw_separators(pictures):
    root, paths = pictures
    text = '{"file": "a.png", "caption": "x\u2028y"}\r\n{"file": "sub/b.png", "caption": "z"}\r\n'
    (root/"captions.jsonl").write_bytes(b"\xef\xbb\xbf" + text.encode())
    assert read_captions(root, paths) == ["x\u2028y", "z"]


def test_a_text_beside_each(pictures):
    root, paths = pictures
    assert read_captions(root, paths) is None
    (root/"a.txt").write_text("  eins\n")
    with pytest.warns(UserWarning, match="1 of 2 images have none, the first is b.png"):
        assert read_captions(root, paths) == ["eins", None]
    (root/"sub"/"b.txt").write_text("zwei")
    with warnings.catch_warnings(action="error"): assert read_captions(root, paths)[1] == "zwei"


def test_an_image_without_a_caption_is_said_once(pictures):
    root, paths = pictures
    listed(root, {"file": "a.png", "caption": "?"})
    with pytest.warns(UserWarning) as caught: assert read_captions(root, paths) == ["?", None]
    assert len(caught) == 1 and "2 of 2" in str(caught[0].message)


@pytest.mark.parametrize("line, says", [
    ('{"file": "a.png"', "line 2 is not JSON"), ("[1]", "line 2: found"),
    ('{"file": "a.png"}', "line 2: found"), ('{"file": 1, "caption": "x"}', "line 2: found"),
    ('{"file": "sub/b.png", "caption": null}', "line 2: found"),
    ('{"file": "a.png", "caption": "again"}', "line 2: a.png has a caption already"),
    ('{"file": "c.png", "caption": "x"}', "1 of 2 captions are for no image in .*'c.png'")])
def test_wrong_lines(pictures, line, says):
    root, paths = pictures
    (root/"captions.jsonl").write_text('{"file": "a.png", "caption": "ok"}\n' + line)
    with pytest.raises(ValueError, match=says) as error: read_captions(root, paths)
    assert "captions.jsonl" in str(error.value) and "\n" not in str(error.value)


def test_not_utf8(pictures):
    root, _ = pictures
    (root/"captions.jsonl").write_bytes(b"\xff\xfe")
    with pytest.raises(ValueError, match="not UTF-8 .byte 0xff at 0"):
        read_jsonl(root/"captions.jsonl")


def test_it_needs_no_torch():
    code = "import sys; import diffusion_model.captions; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], text=True, capture_output=True)
    assert done.stdout.strip() == "False", done
