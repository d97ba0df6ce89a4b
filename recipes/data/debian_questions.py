"""What can be stated and asked of a Debian package, in several wordings: facts of its stanza, sayings of its text."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

from debian_packages import Package

PROJECT_HOSTS = re.compile(
    r"metacpan|cran\.r-project|pypi|hackage|gnu\.org|apache\.org|gnome\.org|kde\.org|bioconductor"
)
CODE_HOSTS = re.compile(r"git|bitbucket|launchpad|sr\.ht|codeberg|salsa|~|/users?/|blog", re.IGNORECASE)
MAX_RELATED = 4
LANGUAGES = {"c": "C", "c++": "C++", "java": "Java", "lisp": "Lisp", "ocaml": "OCaml", "perl": "Perl", "php": "PHP"} | {
    "python": "Python",
    "ruby": "Ruby",
    "shell": "shell script",
    "tcl": "Tcl",
}
INTERFACES = {"commandline": "the command line", "text-mode": "a text terminal", "web": "a web browser", "x11": "X11"}


@dataclass(frozen=True)
class Fact:
    """One fact: how to read it, how to state it (`{it}`, `{value}`), how to ask for it (`{name}`)."""

    name: str
    read: Callable[[Package], str]
    statements: tuple[str, ...]
    questions: tuple[str, ...]


@dataclass(frozen=True)
class Saying:
    """One way in which a description says something: the words before the answer, and how to ask for it (`{name}`)."""

    name: str
    said: str
    questions: tuple[str, ...]


def read_homepage(package: Package) -> str:
    """The homepage, if it is that of a project: sites of persons and of code are left out."""
    page = package.fields.get("Homepage", "")
    host = page.split("/")[2] if page.count("/") >= 2 else ""
    stem = max(re.findall(r"[a-z0-9]+", package.source.lower()), key=len, default="-")
    of_project = PROJECT_HOSTS.search(host) or (len(stem) > 2 and stem in re.sub(r"[^a-z0-9]", "", host.lower()))
    return page.rstrip("/") if of_project and not CODE_HOSTS.search(page) else ""


def read_related(package: Package, relation: str) -> str:
    """The packages that stand in a relation to this one, in words; nothing where they are many."""
    entries = [entry for entry in package.fields.get(relation, "").split(", ") if entry]
    names = list(dict.fromkeys(re.split(r"[ (|:]", entry, maxsplit=1)[0] for entry in entries))
    if not names or len(names) > MAX_RELATED:
        return ""
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def read_tag(package: Package, facet: str, words: dict[str, str]) -> str:
    """What the one tag of a facet says; nothing where there are several."""
    tags = re.findall(rf"\b{facet}::([\w+-]+)", package.fields.get("Tag", ""))
    return words.get(tags[0], "") if len(tags) == 1 else ""


def read_version(package: Package) -> str:
    """The version without epoch and Debian's own revision."""
    version = re.sub(r"^\d+:", "", package.fields["Version"]).rsplit("-", 1)[0]
    version = re.split(r"[+~]", version)[0]
    return version if re.fullmatch(r"\d+(?:\.\w+)+", version) else ""


FACTS = (
    Fact(
        "section",
        lambda package: package.section,
        (
            "{it} is in the section {value} of the archive.",
            "Debian files {it} under {value}.",
            "The section that {it} belongs to is {value}.",
        ),
        (
            "In which section of the archive is {name}?",
            "Which section does {name} belong to?",
            "Under what does Debian file {name}?",
        ),
    ),
    Fact(
        "homepage",
        read_homepage,
        (
            "See {value} for more about {it}.",
            "The homepage of {it} is {value} on the web.",
            "On the web, {value} tells more about {it}.",
        ),
        (
            "What is the homepage of {name}?",
            "At which address can one read more about {name}?",
            "Where on the web is {name} described?",
        ),
    ),
    Fact(
        "architecture",
        lambda package: package.fields["Architecture"],
        (
            "{it} is built for the architecture {value}.",
            "The architecture of {it} is {value}.",
            "As its architecture {it} names {value}.",
        ),
        (
            "For which architecture is {name} built?",
            "What is the architecture of {name}?",
            "Which architecture does {name} name?",
        ),
    ),
    Fact(
        "installed",
        lambda package: f"{int(package.fields.get('Installed-Size', 0)):,} KiB",
        (
            "Once installed, {it} takes up {value} of the disk.",
            "The installed size of {it} is {value}.",
            "{it} fills {value} after unpacking.",
        ),
        (
            "How much of the disk does {name} take up?",
            "What is the installed size of {name}?",
            "How large is {name} once it is unpacked?",
        ),
    ),
    Fact(
        "download",
        lambda package: f"{max(1, round(int(package.fields['Size']) / 1000)):,} kB",
        (
            "The file to download for {it} has {value}.",
            "To get {it}, {value} must be fetched.",
            "The download size of {it} is {value}.",
        ),
        (
            "How large is the file to download for {name}?",
            "How much must be fetched to get {name}?",
            "What is the download size of {name}?",
        ),
    ),
    Fact(
        "version",
        read_version,
        (
            "The release has version {value} of {it}.",
            "{it} is at version {value} in this release.",
            "The packaged version of {it} is {value}.",
        ),
        (
            "Which version of {name} does the release have?",
            "At which version is {name}?",
            "What version of {name} is packaged?",
        ),
    ),
    Fact(
        "depends",
        lambda package: read_related(package, "Depends"),
        ("{it} depends on {value}.", "{it} does not work without {value}.", "What {it} needs is {value}."),
        ("What does {name} depend on?", "Without what does {name} not work?", "What does {name} need?"),
    ),
    Fact(
        "recommends",
        lambda package: read_related(package, "Recommends"),
        ("{it} recommends {value}.", "Along with {it} one should have {value}."),
        ("What does {name} recommend?", "What should one have along with {name}?"),
    ),
    Fact(
        "suggests",
        lambda package: read_related(package, "Suggests"),
        ("{it} suggests {value}.", "As an addition to {it} one may like {value}."),
        ("What does {name} suggest?", "What may one like as an addition to {name}?"),
    ),
    Fact(
        "source",
        lambda package: package.source if package.source != package.name else "",
        (
            "{it} is built from the source package {value}.",
            "{value} is the source from which {it} is made.",
            "The source of {it} is called {value}.",
        ),
        (
            "From which source package is {name} built?",
            "What is the source of {name} called?",
            "From which source is {name} made?",
        ),
    ),
    Fact(
        "language",
        lambda package: read_tag(package, "implemented-in", LANGUAGES),
        (
            "{it} is implemented in {value}.",
            "{value} is the language in which {it} is written.",
            "The code of {it} is {value}.",
        ),
        (
            "In which language is {name} written?",
            "What is {name} implemented in?",
            "What language is the code of {name}?",
        ),
    ),
    Fact(
        "interface",
        lambda package: read_tag(package, "interface", INTERFACES),
        ("{it} is used through {value}.", "One works with {it} through {value}."),
        ("Through what is {name} used?", "How does one work with {name}?"),
    ),
)

SAYINGS = (
    Saying("is", r"is(?= an? )", ("What is {name}?", "What sort of thing is {name}?")),
    Saying("provides", r"(?:provides|offers)", ("What does {name} provide?", "What does one get from {name}?")),
    Saying(
        "allows", r"(?:allows|lets) (?:one|you|users|the user|developers) (?:to )?", ("What does {name} let one do?",)
    ),
    Saying("supports", r"supports", ("What does {name} support?", "What is supported by {name}?")),
    Saying(
        "used", r"(?:is|can be|may be) used (?:to|for)", ("What is {name} used for?", "What does one use {name} for?")
    ),
    Saying("designed", r"(?:is|was) (?:designed|intended|meant) (?:to|for)", ("What is the purpose of {name}?",)),
    Saying("based", r"(?:is|was) (?:based|built) on", ("What is {name} based on?", "On what does {name} build?")),
    Saying("contains", r"(?:contains|includes)", ("What does {name} contain?", "What is in {name}?")),
    Saying("uses", r"uses", ("What does {name} use?", "What does {name} make use of?")),
    Saying("implements", r"implements", ("What does {name} implement?", "What is implemented by {name}?")),
    Saying("aims", r"(?:aims|tries|attempts) (?:to|at)", ("What does {name} aim at?", "What is the aim of {name}?")),
)
