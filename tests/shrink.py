"""Saved pictures in at most 256 colours: less than half the size, and no difference that one sees.

    python tests/shrink.py    # `make export` does it too
"""
import base64, io, json

from PIL import Image

from pages import NOTEBOOKS


def shrunk(picture: str) -> str:
    "A PNG in base64, with a palette where that makes it smaller."
    before = base64.b64decode(picture)
    image = Image.open(io.BytesIO(before))
    if image.mode == "P": return picture
    after = io.BytesIO()
    palette = image.convert("RGB").quantize(256, kmeans=1, dither=Image.Dither.NONE)
    palette.save(after, "PNG", optimize=True)
    if after.tell() >= len(before): return picture
    end = "\n" if picture.endswith("\n") else ""
    return base64.b64encode(after.getvalue()).decode() + end


if __name__ == "__main__":
    for path in NOTEBOOKS:
        text = path.read_text()
        book = json.loads(text)
        for output in (o for cell in book["cells"] for o in cell.get("outputs", [])):
            data = output.get("data", {})
            if "image/png" in data: data["image/png"] = shrunk("".join(data["image/png"]))
        new = json.dumps(book, indent=1, ensure_ascii=False, sort_keys=False) + "\n"
        if new != text: path.write_text(new)
