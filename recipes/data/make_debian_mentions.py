"""Make debian-mentions.jsonl: sentences about Debian packages with the technical things that they name, by list.

python recipes/data/make_debian_mentions.py --lists /tmp/lists recipes/data/debian-mentions.jsonl
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator
from itertools import chain

from debian_packages import Package, is_prose, names_somebody, read_share, sentences, write_rows
from make_debian_sections import arguments, content_words, digest, fetch_lists, is_known

ROWS_WITH, ROWS_WITHOUT = 900, 300
ROWS_A_NAME = 60
ROWS_A_SECTION = 150
MIN_TOKENS, MAX_TOKENS = 7, 40
NAMES = {
    "LANGUAGE": """
        Ada, ANSI C, AWK, Bash, BASIC, Brainfuck, C, C#, C++, C99, Clojure, Cobol, CoffeeScript, Common Lisp, Coq,
        Cython, ECMAScript, Eiffel, Elisp, Elixir, Emacs Lisp, Erlang, F#, Forth, FORTRAN, Fortran, GLSL, GNU R, Go,
        Golang, GraphQL, Groovy, Haskell, Haxe, ISO C, Java, JavaScript, Javascript, Julia, Kotlin, Lisp, Logo, Lua,
        MATLAB, Matlab, ML, Nim, Objective C, Objective Caml, Objective-C, OCaml, Octave, OpenCL, Pascal, Perl, Perl5,
        PHP, PHP5, PL / pgSQL, Prolog, Pure Data, Python, Python2, Python3, R, R6RS Scheme, Racket, Raku, Ruby, Rust,
        Scala, Scheme, Scilab, Smalltalk, SPARQL, SQL, Standard ML, Swift, Tcl, TypeScript, Vala, Verilog, VHDL,
        Visual Basic, XPath, XQuery, XSLT""",
    "FORMAT": """
        AAC, AsciiDoc, ASN.1, Atom, AVI, BAM, BibTeX, BMP, BSON, CBOR, CSS, CSS3, CSV, DICOM, DjVu, DocBook, DocBook
        XML, DOT, DVI, DXF, ELF, EPS, EPUB, FASTA, FASTQ, FITS, FLAC, FLV, GeoJSON, GeoTIFF, GIF, GML, GPX, GTF, HDF,
        HDF5, HTML, HTML5, iCalendar, ICC, ID3, INI, JBIG2, JPEG, JPEG 2000, JPEG XL, JPG, JSON, JSON Schema, KML,
        LaTeX, M3U, MARC, Markdown, Matroska, MessagePack, MIDI, MIME, MKV, MNG, MP3, MP4, MPEG, MusicXML, NetCDF,
        NIfTI, ODF, ODT, Ogg, Ogg Theora, Ogg Vorbis, OpenDocument, OpenType, Opus, OTF, OWL, PBM, PCX, PDB, PDF, PGM,
        PNG, PNM, Portable Document Format, Portable Network Graphics, PostScript, Postscript, PPM, Protobuf, Protocol
        Buffers, RDF, reStructuredText, Rich Text Format, RSS, RTF, SAM, SCSS, SGML, SMILES, SVG, SWF, TeX, Texinfo,
        TGA, TIFF, TOML, TrueType, TSV, TTF, vCard, VCF, Vorbis, VRML, WAV, WebAssembly, WebM, WebP, WMA, WMV, WOFF,
        WOFF2, WSDL, XBM, XHTML, XLS, XLSX, XML, XML Schema, XPM, XSD, YAML, ZIP""",
    "PROTOCOL": """
        AMQP, ARP, BGP, BitTorrent, Bluetooth, CalDAV, CardDAV, CIFS, CoAP, D-Bus, DBus, DHCP, DHCPv6, DLNA, DNS,
        DNSSEC, Domain Name System, FastCGI, FTP, Gopher, gRPC, HTTP, HTTP / 2, HTTPS, Hypertext Transfer Protocol,
        ICMP, IMAP, IMAP4, Internet Printing Protocol, IP, IPP, IPsec, IPv4, IPv6, IRC, iSCSI, Jabber, JSON-RPC,
        Kerberos, LDAP, Lightweight Directory Access Protocol, mDNS, Modbus, MQTT, Netlink, NFS, NNTP, NTP, OAuth,
        OAuth 2.0, OpenID, OpenID Connect, OSC, OSPF, POP3, PPP, PPPoE, PPTP, QUIC, RADIUS, RFB, RTMP, RTP, RTSP,
        SASL, SCTP, Secure Shell, Secure Sockets Layer, Session Initiation Protocol, SFTP, SIP, SMB, SMTP, SNMP, SOAP,
        SOCKS, SOCKS5, SPDY, SSDP, SSH, SSL, STUN, TCP, TCP / IP, Telnet, TFTP, TLS, Transport Layer Security, UDP,
        UPnP, VNC, Wayland, WebDAV, WebRTC, WebSocket, WebSockets, XML-RPC, XMPP, Zeroconf""",
    "DESKTOP": """
        Blackbox, Budgie, Cinnamon, Clutter, COSMIC, Enlightenment, FLTK, Fluxbox, FVWM, GNOME, GNOME Shell, GNUstep,
        GTK, Gtk, GTK+, Gtk+, GTK2, GTK3, GTK4, IceWM, JavaFX, KDE, KDE Frameworks, KDE Plasma, KDE4, Lightweight X11
        Desktop Environment, LXDE, LXQt, MATE, Motif, Ncurses, ncurses, Openbox, Phosh, Plasma, Plasma Mobile, PyQt,
        Qt, Qt Quick, Qt4, Qt5, Qt6, SDL, Sway, Swing, Tk, Unity, Window Maker, wxWidgets, X Window System, XFCE,
        Xfce""",
}
VERSIONED = frozenset(
    re.findall(r"\S+", "Fortran GNOME GTK GTK+ Gtk HTML Java KDE Lua PHP Perl Plasma Python Qt Ruby SDL TLS SSL SNMP")
)
VERSION = re.compile(r"v?\d+(?:\.\d+)*")
AFTER_LANGUAGE = (
    r"(?:language|programming|source|code|program|programs|library|libraries|compiler|compilers|bindings|binding|module|modules"
    r"|package|packages|API|APIs|extension|extensions|functions|function|implementation|preprocessor|developers|runtime"
    r"|interface|interpreter|and C\+\+|or C\+\+|, C\+\+|/ C\+\+)\b"
)
NEVER = r"(?!)"
# A name that is also an English word, a letter or another thing: what must stand before or after it to be sure.
SURE = {
    "C": (
        r"(?:written|implemented|programmed) in $|(?:plain|pure|ANSI|in|for) $",
        rf" ?{AFTER_LANGUAGE}|[+]* and C\+\+",
    ),
    "Go": (r"(?:written|implemented|developed) in (?:pure )?$|\bpure $", rf" {AFTER_LANGUAGE}"),
    "R": (r"(?:written|implemented|available|used) in $|\bGNU $|statistical language $", rf" {AFTER_LANGUAGE}"),
    "Swift": (r"(?:written|implemented) in $", r" (?:programming )?language"),
    "Scheme": (r"(?:written|implemented) in $", rf" {AFTER_LANGUAGE}"),
    "Logo": (NEVER, r" (?:programming )?language"),
    "ML": (r"(?:Standard|written in) $", r" (?:programming )?language"),
    "Octave": (r"(?:GNU|for|with|in) $", r" (?:package|function|code|and Matlab)"),
    "Rust": (r"(?:written|implemented) in $|\bin (?:pure )?$|\bfor $", rf" (?:crate|crates|{AFTER_LANGUAGE})"),
    "Ruby": (NEVER, r"(?! on Rails)"),
    "Atom": (r"(?:RSS|RDF) (?:and|or|/|,) $", r" (?:feed|feeds|format|syndication)"),
    "DOT": (NEVER, r" (?:file|files|format|language)"),
    "INI": (NEVER, r" (?:file|files|format|style)"),
    "MIDI": (NEVER, r" (?:file|files|format)"),
    "SAM": (NEVER, r" ?(?:/|and|or|,) (?:BAM|CRAM)| (?:file|files|format)"),
    "VCF": (NEVER, r" (?:file|files|format)"),
    "PDB": (NEVER, r" (?:file|files|format)"),
    "Opus": (NEVER, r" (?:audio|codec|file|files|format)"),
    "IP": (r"TCP / $", r" (?:protocol|protocols|network|networks|packet|packets)"),
    "SIP": (NEVER, r" (?:protocol|server|client|phone|proxy|stack|user|message|messages)"),
    "OSC": (NEVER, r" (?:protocol|message|messages|server|client)"),
    "Motif": (NEVER, r" (?:toolkit|widget|widgets|library|application|applications)"),
    "Swing": (r"Java $", r" (?:component|components|application|applications|GUI|toolkit|library)"),
    "Unity": (NEVER, r" (?:desktop|shell)"),
    "Enlightenment": (NEVER, r" (?:window|desktop|DR)"),
    "Clutter": (NEVER, r" (?:toolkit|library|based|scene|canvas)"),
    "Cinnamon": (NEVER, r" (?:desktop|session|environment)"),
    "Plasma": (r"KDE $", r" (?:desktop|workspace|workspaces|widget|widgets|applet|Mobile|\d)"),
    "Sway": (NEVER, r" (?:compositor|window|and|desktop)"),
    "COSMIC": (NEVER, r" (?:desktop|session)"),
}
ORDINARY = frozenset(
    re.findall(
        r"\w+",
        "ada atom awk basic bash c clutter dot eiffel enlightenment forth go groovy ip java julia logo logos motif"
        " nim opus owl pascal plasma r racket ruby rust sam scala scheme swift sway swing unity"
        " opentype cosmic budgie mate",
    )
)


def main() -> None:
    """Fetch the package lists, tag sentences, choose rows, write them."""
    given = arguments(__doc__)
    fetch_lists(given.lists)
    rows = list(choose(read_share(given.lists, "mentions")))
    write_rows(given.out, sorted(rows, key=lambda row: digest(str(row["source"]))))


def tokenize(text: str) -> list[str]:
    """Split a sentence into words and punctuation; `C++`, `D-Bus` and `node.js` stay whole, `TCP/IP` becomes three."""
    return re.findall(r"[^\W_]+(?:[.'’&:-]+[^\W_]+)*(?:\+\+|\+(?=[\s,.;:)]|$)|#)?|[^\w\s]|_", text)


def phrases() -> dict[tuple[str, ...], str]:
    """All listed names as tokens, each with its type."""
    listed = {kind: [" ".join(name.split()) for name in names.split(",")] for kind, names in NAMES.items()}
    return {tuple(name.split(" ")): kind for kind, names in listed.items() for name in names}


PHRASES = phrases()
LONGEST = max(map(len, PHRASES))
WORDS = frozenset(chain.from_iterable(phrase for phrase in PHRASES if len(phrase) == 1))
LOWERED = frozenset(word.lower() for word in WORDS) - ORDINARY


def tag(tokens: list[str]) -> list[str] | None:
    """Tag the tokens in IOB2, the longest name first; None where a name is not sure to be one, or is spelled oddly."""
    tags: list[str] = []
    while len(tags) < len(tokens):
        start = len(tags)
        phrase = next(
            (tuple(tokens[start : start + n]) for n in range(LONGEST, 0, -1) if is_phrase(tokens, start, n)), ()
        )
        if not phrase:
            if is_doubtful(tokens[start]):
                return None
            tags.append("O")
            continue
        if not is_sure(tokens, start, phrase):
            return None
        end = start + len(phrase)
        if phrase[-1] in VERSIONED and end < len(tokens) and VERSION.fullmatch(tokens[end]):
            end += 1
        tags += [f"B-{PHRASES[phrase]}", *[f"I-{PHRASES[phrase]}"] * (end - start - 1)]
    return tags


def is_phrase(tokens: list[str], start: int, count: int) -> bool:
    """Whether the `count` tokens from `start` on are a listed name."""
    return start + count <= len(tokens) and tuple(tokens[start : start + count]) in PHRASES


def is_sure(tokens: list[str], start: int, phrase: tuple[str, ...]) -> bool:
    """Whether the words around an ambiguous name say that it is meant; other names are always sure."""
    if phrase[0] not in SURE or len(phrase) > 1:
        return True
    before, after = SURE[phrase[0]]
    left = " ".join(tokens[max(0, start - 3) : start]) + " "
    right = " " + " ".join(tokens[start + 1 : start + 4])
    return bool(re.search(before, left) or re.match(after, right))


def is_doubtful(token: str) -> bool:
    """Whether a token that is no listed name is like one: in other letters (`html`) or a part of it (`GTK-based`)."""
    parts = re.split(r"[-.:/&]", token)
    return token.lower() in LOWERED or (
        len(parts) > 1 and any(part in WORDS or part.lower() in LOWERED for part in parts)
    )


def choose(packages: Iterable[Package]) -> Iterator[dict[str, object]]:
    """Yield rows with names and rows without, one a source package, no name too often, without near-duplicates."""
    names: Counter[str] = Counter()
    sections: Counter[str] = Counter()
    left = {True: ROWS_WITH, False: ROWS_WITHOUT}
    sources: set[str] = set()
    seen: list[frozenset[str]] = []
    for package in packages:
        if names_somebody("\n".join(package.paragraphs)):
            continue
        for sentence in chain.from_iterable(map(sentences, filter(is_prose, package.paragraphs[:2]))):
            tokens = tokenize(sentence)
            if package.source in sources or not MIN_TOKENS <= len(tokens) <= MAX_TOKENS:
                continue
            tags, words = tag(tokens), content_words(sentence)
            if tags is None or not sentence.isascii() or is_known(words, seen):
                continue
            named = {token for token, label in zip(tokens, tags, strict=True) if label.startswith("B-")}
            if not left[bool(named)] or any(names[name] == ROWS_A_NAME for name in named):
                continue
            if sections[package.section] == ROWS_A_SECTION:
                continue
            left[bool(named)] -= 1
            sections[package.section] += 1
            names.update(named)
            sources.add(package.source)
            seen.append(words)
            yield {"tokens": tokens, "tags": tags, "source": package.source}


if __name__ == "__main__":
    main()
