import base64
import json
from pathlib import Path

from support.browser import browser, open_browser
from support.learning import WEATHER
from support.pictures import picture_bytes
from support.serving import load_served, served_of, serving

pytestmark = browser
SAID = "[...document.querySelectorAll('.model .said')].map(e => e.textContent)"
DONE = "!document.querySelector('.writing') && document.querySelector('#stop').hidden"
MARKUP = "<b id=injected>Which</b> colour <img src=x onerror=alert(1)>?"


def test_a_question_is_typed_and_its_answer_streams_in_as_text(tune, tmp_path):
    served = served_of(tune(generation={"max_new_tokens": 300}))
    decode = served.processor.decode  # a model may write any text
    served.processor.decode = lambda ids, **options: f"<i id=injected>{decode(ids, **options)}"
    with serving(served) as url, open_browser(tmp_path / "profile") as page:
        page.open(url)
        page.wait("document.querySelector('#model').options.length === 1")
        page.type("#prompt", MARKUP)
        page.press_enter()
        page.wait(f"{SAID}[0].length > 20")
        assert page.run("!!document.querySelector('.writing')"), "the answer came at once"
        assert not page.run("document.querySelector('#stop').hidden")
        grown = page.run(f"{SAID}[0].length")
        page.wait(f"{SAID}[0].length > {grown}")
        page.wait(DONE)
        assert page.run(f"{SAID}[0]").startswith("<i id=injected>")
        assert page.run("document.querySelector('.user .said').textContent") == MARKUP
        assert page.run("document.querySelector('#injected')") is None
        page.type("#prompt", "And the dog?")
        page.click("#send")
        page.wait(f"{SAID}.length === 2 && {DONE}")
        assert all(address.startswith((url, "data:")) for address in page.asked), page.asked
        assert page.errors == []
        for width, dark in ((1000, False), (360, True)):
            page.resize(width, 700, dark)
            page.take_picture(tmp_path / f"page-{width}.png")
            assert page.run("document.documentElement.scrollWidth <= innerWidth"), f"{width}: it scrolls sideways"


def test_thoughts_calls_and_markdown_are_shown_and_never_treated_as_markup(learned_url, tmp_path):
    with open_browser(tmp_path / "profile") as page:
        page.open(learned_url)
        page.wait("document.querySelector('#model').options.length === 2")
        page.click("#settings summary")
        page.type("#system", "Be fine.")
        page.type("#prompt", "Show it!")
        page.press_enter()
        page.wait(f"{SAID}.length && {DONE}")
        said = "document.querySelector('.model .said')"
        tags = page.run(f"[...{said}.querySelectorAll('*')].map(e => e.localName)")
        assert tags == ["h3", "p", "strong", "code", "ul", "li", "li", "pre", "code", "p", "a"]
        assert page.run(f"{said}.querySelector('pre').textContent") == "<i id=injected>code</i>"
        assert page.run(f"{said}.querySelector('a').href") == "https://example.org/"
        assert "[bad](javascript:alert(1)) <i id=injected>no</i>" in page.run(f"{said}.textContent")
        page.run("document.querySelector('#system').value = ''")
        page.click("#forget")
        page.type("#prompt", "Think!")
        page.press_enter()
        page.wait(f"{SAID}.length && {DONE}")
        thoughts = "document.querySelector('.thoughts')"
        assert page.run(f"{thoughts}.lastChild.textContent") == "two and two"
        assert page.run(f"{thoughts}.open") is False
        assert page.run(f"{SAID}[0]") == "Four."


def test_the_user_writes_the_results_of_calls_and_two_models_answer_side_by_side(learned_url, tmp_path):
    calls = "[...document.querySelectorAll('.call')].map(e => e.textContent)"
    with open_browser(tmp_path / "profile") as page:
        page.open(learned_url)
        page.resize(1100, 800)
        page.wait("document.querySelector('#model').options.length === 2")
        page.run("document.querySelector('#beside').value = 'base'")
        page.run("document.querySelector('#beside').dispatchEvent(new Event('change'))")
        page.click("#settings summary")
        page.type("#tools", json.dumps([WEATHER]))
        page.click("#settings summary")
        page.type("#prompt", "And in Rome?")
        page.press_enter()
        page.wait(f"{calls}.length && {DONE}")
        assert page.run(calls)[0] == 'weather({"city": "Rome"})'
        left, right = page.run("[...document.querySelectorAll('.model')].map(e => e.getBoundingClientRect().x)")
        assert left < right
        assert page.run("prompt.placeholder") == "Result of weather (tiny)"
        page.take_picture(tmp_path / "two.png")
        page.type("#prompt", "sun")
        page.press_enter()
        page.wait(f"{SAID}.length === 3 && {DONE}")
        assert page.run(f"{SAID}[2]") == "In Rome: sun."
        page.resize(360, 700, dark=True)
        page.take_picture(tmp_path / "two-360.png")
        assert page.run("document.documentElement.scrollWidth <= innerWidth")
        assert page.errors == []


def test_a_conversation_goes_on_that_began_before_the_models_were_listed(tune, tmp_path):
    with serving(served_of(tune())) as url, open_browser(tmp_path / "profile") as page:
        page.open(url)
        page.wait("document.querySelector('#model').options.length === 1")
        page.run("document.querySelector('#model').replaceChildren()")  # the list is on its way
        page.type("#prompt", "Tell me everything.")
        page.press_enter()
        page.wait(f"{SAID}.length === 1 && {DONE}")
        page.run("listModels()")
        page.type("#prompt", "And now?")
        page.press_enter()
        page.wait(f"{SAID}.length === 2 && {DONE}")
        assert page.run("talks[0].messages.length") == 4


def test_stop_ends_the_answer_and_frees_its_row(tune, tmp_path):
    served = served_of(tune(generation={"max_new_tokens": 2000}))
    with serving(served) as url, open_browser(tmp_path / "profile") as page:
        page.open(url)
        page.type("#prompt", "Tell me everything.")
        page.press_enter()
        page.wait(f"({SAID}[0] || '').length > 5")
        page.click("#stop")
        page.wait(DONE)
        length = page.run(f"{SAID}[0].length")
        page.type("#prompt", "And now?")  # answered at once, as nothing runs any more
        page.press_enter()
        page.wait(f"({SAID}[1] || '').length > 0")
        assert page.run(f"{SAID}[0].length") == length
        page.click("#forget")
        assert page.run(f"{SAID}.length") == 0


def test_the_page_has_a_key_field_if_a_key_is_required(tune, tmp_path):
    served = served_of(tune())
    with serving(served, key="correct-horse-battery") as url, open_browser(tmp_path / "p") as page:
        page.open(url)
        page.type("#prompt", "Hello?")
        page.press_enter()
        page.wait("/API key missing/.test(document.querySelector('.failed .said')?.textContent || '')")
        page.type("#key", "correct-horse-battery")
        page.run("document.querySelector('#key').dispatchEvent(new Event('change'))")
        page.wait("document.querySelector('#model').options.length === 1")
        page.type("#prompt", "Hello?")
        page.press_enter()
        page.wait(f"({SAID}[0] || '').length > 0 && {DONE}")


def test_the_documentation_is_self_contained(tune, tmp_path: Path):
    with serving(served_of(tune())) as url, open_browser(tmp_path / "profile") as page:
        page.open(f"{url}/docs")
        page.wait("document.querySelectorAll('h2').length > 5")
        text = page.run("document.body.textContent")
        for path in ("/v1/chat/completions", "/v1/completions", "/v1/models", "/health/ready"):
            assert path in text
        page.resize(360, 700)
        page.take_picture(tmp_path / "docs.png")
        assert page.run("document.documentElement.scrollWidth <= innerWidth")
        assert {address.removeprefix(url) for address in page.asked} <= {"/docs", "/openapi.json"}


def attach(page, number):
    """Choose a drawn picture as a person does in the dialog of the browser."""
    text = base64.b64encode(picture_bytes(number)).decode()
    page.run(f"""(() => {{
      const bytes = Uint8Array.from(atob("{text}"), (letter) => letter.charCodeAt(0)), chosen = new DataTransfer();
      chosen.items.add(new File([bytes], "x.png", {{type: "image/png"}}));
      document.querySelector("#file").files = chosen.files;
      document.querySelector("#file").dispatchEvent(new Event("change"));
    }})()""")


def test_pictures_are_attached_and_asked_of_the_tuned_model_and_its_base(image_run, tmp_path):
    models = load_served(tiny=image_run("gemma3"))
    asked = []
    for model in models.values():
        plain = model.generate

        def note(prompt, *others, plain=plain):
            asked.append(prompt.media()["pixel_values"].shape[0])
            return plain(prompt, *others)

        model.generate = note
    with serving(*models.values()) as url, open_browser(tmp_path / "profile") as page:
        page.open(url)
        page.wait("document.querySelector('#model').options.length === 2")
        page.run("document.querySelector('#beside').value = document.querySelector('#model').options[1].value")
        page.run("document.querySelector('#beside').dispatchEvent(new Event('change'))")
        for number in (1, 2, 3):
            attach(page, number)
            page.wait(f"document.querySelectorAll('#attached img').length === {number}")
        page.click("#attached img")
        assert page.run("document.querySelectorAll('#attached img').length") == 2
        page.type("#prompt", "Which is it?")
        page.press_enter()
        page.wait(f"{SAID}.length === 2 && {DONE}")
        assert asked == [2, 2]
        assert page.run("document.querySelectorAll('.user img').length") == 2
        assert page.run("[...document.querySelectorAll('.user img')].every((one) => one.naturalWidth === 48)")
        assert page.run("document.querySelectorAll('#attached img').length") == 0
        page.type("#prompt", "And now?")
        page.click("#send")
        page.wait(f"{SAID}.length === 4 && {DONE}")
        assert asked == [2] * 4
        assert page.errors == []


def test_the_page_of_a_run_without_pictures_offers_none(tune, tmp_path):
    with serving(served_of(tune())) as url, open_browser(tmp_path / "profile") as page:
        page.open(url)
        assert page.run("document.querySelector('#attach').hidden")
