"""The encoding of a file: guessed by `llmtune init`, and checked where a recipe states it, or states none."""

import codecs
from pathlib import Path

import pytest
from support.runs import invoke

from llmtune.data.encoding_guess import guess_encoding

GERMAN = "Betreff;Text;Team\n" + "".join(
    f"Päckchen {i};Größe und Straße fehlen für {i} – danke;Büro\n" for i in range(9)
)
FRENCH = "sujet;corps\n" + "Où est le café de la meilleure des époques ? L’été à Besançon – 5 €\n" * 9
SPANISH = "asunto;texto\n" + "¿Dónde está mi paquete? ¡Feliz año nuevo, señor!\n" * 9
POLISH = "Temat;Tekst\n" + "Zamówienie spóźnia się;Gdzie jest moja paczka? Proszę o szybką odpowiedź, dziękuję.\n" * 9
RUSSIAN = "тема;текст\n" + "Заказ опаздывает;Где моя посылка? Ответьте пожалуйста быстрее.\n" * 9
GREEK = "Θέμα;Κείμενο\n" + "Η παραγγελία καθυστερεί;Πού είναι το δέμα μου; Παρακαλώ απαντήστε.\n" * 9
JAPANESE = "件名,本文\n" + "注文が遅れています,荷物はどこにありますか。早めに返信をお願いします。\n" * 9
CHINESE = "主题,内容\n" + "订单延迟,我的包裹在哪里？请尽快回复，谢谢。\n" * 9
KOREAN = "제목,내용\n" + "주문 지연,내 소포는 어디에 있습니까? 빨리 답변 부탁드립니다.\n" * 9

TURKISH = (
    "konu;metin\n" + "Sipariş gecikti;Paketim nerede? Lütfen çabuk cevap verin, şifremi değiştirdiğim için bakın.\n" * 9
)
ENGLISH = "subject;text\n" + "It hasn’t arrived…;Where’s the “Foo™” – I don’t know, it’s late…\n" * 9
ICELANDIC = (
    "efni;texti\n" + "Pöntun er sein;Hvar er pakkinn minn? Vinsamlegast svarið fljótt, ég bíð ennþá eftir því.\n" * 9
)
DANISH = (
    "emne;tekst\n" + "Ordren er forsinket;Hvor er min pakke? Svar venligst hurtigt på spørgsmålet, ærgerligt.\n" * 9
)
CZECH = "předmět;text\n" + "Objednávka se zpozdila;Kde je můj balíček? Odpovězte co nejrychleji, žádám vás.\n" * 9
CROATIAN = "predmet;tekst\n" + "Narudžba kasni;Gdje je moja pošiljka? Molim što brži odgovor, čekam šest dana.\n" * 9
HUNGARIAN = "tárgy;szöveg\n" + "A rendelés késik;Hol van a csomagom? Minél gyorsabb választ, őszintén.\n" * 9
FINNISH = "aihe;teksti\n" + "Tilaus myöhästyy;Missä pakettini on? Vastatkaa pian, šakki, pyydän.\n" * 9
ITALIAN = "oggetto;testo\n" + "Il pacco è in ritardo;Perché non c’è più? Può darsi, però così è.\n" * 9
PORTUGUESE = "assunto;texto\n" + "A encomenda está atrasada;Não sei onde está, são já três dias, opções não há.\n" * 9
OLD_GERMAN = GERMAN.replace("–", "-")
OLD_FRENCH = FRENCH.replace("’", "'").replace("– 5 €", "")


@pytest.mark.parametrize(
    ("text", "encoding"),
    [
        *((text, name) for text in (OLD_GERMAN, OLD_FRENCH, DANISH) for name in ("cp850", "mac_roman", "cp1252")),
        *((text, "cp1250") for text in (CZECH, CROATIAN, HUNGARIAN)),
        *((text, "cp1252") for text in (FINNISH, ITALIAN, PORTUGUESE)),
        *((TURKISH, "cp1254"), (ICELANDIC, "cp1252"), (ENGLISH, "cp1252")),
        *((text, "cp1252") for text in (GERMAN, FRENCH, SPANISH)),
        *((RUSSIAN, name) for name in ("koi8_r", "cp1251")),
        *((JAPANESE, name) for name in ("cp932", "euc_jp", "iso2022_jp")),
        *((text, name) for text in (GERMAN, JAPANESE) for name in ("utf-16-le", "utf-16-be")),
        *((POLISH, "cp1250"), (GREEK, "cp1253"), (CHINESE, "gb18030"), (KOREAN, "cp949")),
    ],
)
def test_an_encoding_without_a_mark_is_guessed_from_a_whole_file_and_from_two_lines(
    text: str, encoding: str, tmp_path: Path
) -> None:
    file = tmp_path / "rows.csv"
    for part in (text, "\n".join(text.split("\n")[:2])):
        file.write_bytes(part.encode(encoding))
        assert guess_encoding(file) == encoding


@pytest.mark.parametrize("encoding", ["utf-16", "utf-32"])
def test_a_mark_decides(encoding: str, tmp_path: Path) -> None:
    (tmp_path / "rows.csv").write_bytes(JAPANESE.encode(encoding))
    assert guess_encoding(tmp_path / "rows.csv") == encoding


def test_utf8_stays_utf8_with_a_mark_with_damage_and_cut_in_a_character(tmp_path: Path) -> None:
    file, text = tmp_path / "rows.csv", (GERMAN + JAPANESE).encode()
    contents = [text, codecs.BOM_UTF8 + text, text[:-2], text + b"Gr\xfc\xdfe\n", b"plain\n"]
    contents += [b"hello\0world,a\n" * 40]
    contents += [text * (2**20 // len(text) + 1), GERMAN.encode() + GERMAN.encode("cp1252")]
    for content in contents:
        file.write_bytes(content)
        assert guess_encoding(file) is None


RECIPE = """recipe_version: 1
task: classify
data:
  train: %s
  columns: {text: "{Betreff}\\n\\n{Text}", label: Team}
  deduplicate: none
model: {name: builtin:minilm-l6-v2}
"""
HEADER, LINE, PLAIN = (
    "Betreff;Text;Team\n",
    "Nummer {0};Größe für {0} fehlt;{1}\n",
    "Number {0};Size of {0} missing;{1}\n",
)


def check(source: str, encoding: str, plain: int = 0) -> tuple[int, str]:
    lines = [(PLAIN if i < plain else LINE).format(i, "AB"[i % 2]) for i in range(40)]
    Path("rows.csv").write_bytes("".join([HEADER, *lines]).encode(encoding))
    Path("mine.yaml").write_text(RECIPE % source)
    done = invoke("recipes", "check", "mine.yaml")
    return done.exit_code, done.stderr


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "cp1252", "utf-16", "utf-16-le", "utf-16-be", "utf-32"])
@pytest.mark.parametrize("stated", [None, "cp1252", "utf-16", "cp932"])
def test_a_file_that_changed_its_encoding_is_refused_with_the_line_to_write(
    stated: str | None, encoding: str, here: Path
) -> None:
    code, message = check(f"{{path: rows.csv, encoding: {stated}}}" if stated else "rows.csv", encoding)
    if stated == encoding or (stated is None and encoding in ("utf-8", "utf-8-sig", "utf-16", "utf-32")):  # marked
        assert code == 0, message
        return
    fix = f"Remove `encoding: {stated}`" if encoding.startswith("utf-8") else f"encoding: {encoding}"
    assert (code, fix in message) == (3, True), message


def test_one_row_in_another_encoding_is_not_dropped_as_a_bad_row(here: Path) -> None:
    code, message = check("rows.csv", "cp1252", plain=39)
    assert (code, "the file looks like cp1252, not UTF-8" in message) == (3, True)
    refused = invoke("prepare", "mine.yaml", "--out", "out")
    assert (refused.exit_code, "the file looks like cp1252, not UTF-8" in refused.stderr) == (3, True), refused.stderr


def test_a_file_that_ends_within_a_character_is_damaged_not_in_another_encoding(here: Path) -> None:
    code, _ = check("{path: rows.csv, encoding: utf-16}", "utf-16")
    assert code == 0
    Path("rows.csv").write_bytes(Path("rows.csv").read_bytes()[:-1])
    refused = invoke("recipes", "check", "mine.yaml")
    assert (refused.exit_code, "not in the stated encoding" in refused.stderr) == (3, True), refused.stderr
