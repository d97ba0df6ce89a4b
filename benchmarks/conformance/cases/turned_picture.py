"""A picture is turned as its EXIF data says."""

from functools import partial

from conformance.case import Case
from conformance.pictures import EVERY, REFUSED, read, row, sees

ROW = [("user", "<image>Which colour is on the left?"), ("assistant", "Blue.")], ["turned.jpg"]

CASE = Case(
    title="A photo that was taken upside down",
    group="what is learned",
    question="The file's EXIF data says that the camera was upside down, as phones write it. Does the model see the "
    "photo as a person does?",
    threads=[
        "https://github.com/sgl-project/sglang/issues/33464",
        "https://github.com/sgl-project/sglang-omni/pull/2113",
    ],
    rows=[row(*ROW[0], images=ROW[1])],
    settings={"model": "gemma3", "kind": "pictures"},
    reason=rf"\bexif|orientation|{REFUSED}",
    right=sees([ROW], EVERY),
    wrong=sees([ROW], EVERY, "the photo upside down: {}", look=partial(read, upright=False)),
)
