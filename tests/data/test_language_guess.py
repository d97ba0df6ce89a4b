"""The language of rows is guessed from a few short texts, and left open where they do not show it."""

import pytest

from llmtune.data.language_guess import guess_language

TEXTS = {
    "de": "Guten Tag, die Rechnung ist falsch und ich habe das Paket nicht bekommen.",
    "en": "Hello, the parcel is late and I have not received an invoice for it. Please send it to me.",
    "fr": "Bonjour, je n'ai pas reçu le colis et la facture est fausse.",
    "es": "Hola, no he recibido el paquete y la factura de los pedidos está mal. Quiero que me llamen por favor.",
    "it": "Buongiorno, non ho ricevuto il pacco e la fattura che avete mandato non è giusta per il cliente.",
    "pt": "Olá, não recebi o pacote e a fatura que me enviaram está errada. Quero uma resposta para o meu pedido.",
    "nl": "Goedendag, ik heb het pakket niet ontvangen en de factuur van mijn bestelling is niet juist.",
    "sv": "Hej, jag har inte fått paketet och det är fel på fakturan som ni skickade för min beställning.",
    "da": "Hej, jeg har ikke fået pakken, og der er fejl på fakturaen. Det er af stor betydning at I svarer.",
    "no": "Hei, jeg har ikke fått pakken og det er feil på fakturaen som dere sendte av gårde.",
    "pl": "Dzień dobry, nie dostałem paczki i na fakturze jest błąd. Czy to się da zmienić?",
    "cs": "Dobrý den, nedostal jsem balík a na faktuře je chyba. Co se s tím dá dělat, že to není?",
    "tr": "Merhaba, paketim gelmedi ve bu fatura için bir hata var. Çok geç.",
    "ru": "Здравствуйте, посылка не пришла",
    "uk": "Добрий день, посилка не прийшла, її немає",
    "ja": "荷物が届いていません",
    "zh": "包裹还没有到",
    "ko": "소포가 아직 도착하지 않았습니다",
    "ar": "لم يصل الطرد",
    "el": "Το δέμα δεν έφτασε",
    "fi": "Hei, paketti ei ole tullut ja lasku on väärin. En tiedä mitä se on.",
    "hu": "Jó napot, a csomag nem jött meg, és az a baj, hogy ez egy rossz számla.",
    "ro": "Bună ziua, nu am primit pachetul și factura este greșită pentru comanda mea.",
    "vi": "Tôi không nhận được bưu kiện và hóa đơn của tôi là sai",
    None: "Cheap pills now! x = y + 1; 12 34 B-ORG O O O B-PER",
}


@pytest.mark.parametrize("code", TEXTS)
def test_a_short_text_shows_its_language(code):
    assert guess_language([TEXTS[code]]) == code


def test_no_text_has_no_language():
    assert guess_language([]) is None
