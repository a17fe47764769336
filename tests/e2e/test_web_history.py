"""The chat page in a real browser: branches, attachments, and what is kept, found, exported and imported."""

from __future__ import annotations

import base64
import json
import struct
import zlib
from pathlib import Path
from typing import Any

from tests.e2e.browser import Browser, Keys
from tests.e2e.page_script import HOSTILE, MODEL, Script, card

SEES = card(capabilities={"vision": True})

GIF = b"GIF89a\1\0\1\0\x80\0\0\xff\0\0\0\0\0,\0\0\0\0\1\0\1\0\0\2\2D\1\0;"


def png(width: int = 3, height: int = 2) -> bytes:
    """A red image."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    rows = zlib.compress((b"\0" + b"\xff\0\0" * width) * height)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


def shows(chat: Browser, role: str, *texts: str) -> None:
    """Waits until these are the messages of a role."""
    chat.becomes(lambda: chat.texts(f".from-{role} .message-body"), list(texts))


def lists(chat: Browser, *titles: str) -> None:
    """Waits until these are the conversations in the list."""
    chat.becomes(lambda: chat.texts(".conversation-title"), list(titles))


def version(chat: Browser) -> str | None:
    return chat.attribute(".versions", "aria-label")


def sent(script: Script) -> list[Any]:
    """Contents of the messages in the last request. It was answered, so it is there."""
    return [message["content"] for message in script.requests[-1]["messages"]]


def press(chat: Browser, label: str, number: int = -1) -> None:
    """Clicks a button that is shown when something points at it."""
    script = """
        const found = [...document.querySelectorAll(arguments[0])].at(arguments[1]);
        found?.click();
        return found !== undefined;
    """
    chat.wait(lambda: chat.run(script, f'[aria-label^="{label}"]', number), label)


def notes(chat: Browser, text: str) -> None:
    """Waits for a notice."""
    chat.becomes(lambda: chat.texts(".notice span"), [text])


def has(chat: Browser, selector: str, number: int) -> None:
    """Waits until there are so many such elements."""
    chat.becomes(lambda: len(chat.all(selector)), number)


def attach(chat: Browser, *paths: Path) -> None:
    num = len(chat.all("#composer-attachments li"))
    chat.all("#file-picker")[0].send_keys("\n".join(map(str, paths)))
    has(chat, "#composer-attachments li", num + len(paths))


def sees(chat: Browser, script: Script) -> None:
    """Serves a model that takes images."""
    script.models = [SEES]
    chat.reload()
    chat.wait(lambda: chat.all('[aria-label="Attach images or text files"]'))


# -- branches ----------------------------------------------------------------------------------------------------


def test_versions_of_answers_and_questions(chat: Browser, script: Script) -> None:
    chat.ask("one")
    script.says("Otherwise.")
    press(chat, "Regenerate answer")
    chat.finish()
    shows(chat, "assistant", "Otherwise.")
    assert script.requests[1]["messages"] == script.requests[0]["messages"]
    chat.ask("two")
    assert sent(script) == ["one", "Otherwise.", "two"]
    chat.click('[aria-label="Previous version"]')
    shows(chat, "assistant", "Hello world.")
    shows(chat, "user", "one")
    chat.becomes(lambda: version(chat), "Version 1 of 2")
    # The focus is on the button that leads back; what followed the other version is there again.
    chat.becomes(lambda: chat.focused("aria-label"), "Next version")
    chat.type(Keys.ENTER)
    shows(chat, "user", "one", "two")
    press(chat, "Edit message", 0)
    chat.type(Keys.CONTROL, "a", Keys.NULL, "uno", Keys.ENTER)
    chat.finish()
    assert sent(script) == ["uno"]
    shows(chat, "user", "uno")
    chat.reload()
    shows(chat, "user", "uno")
    chat.click('.from-user [aria-label="Previous version"]')
    shows(chat, "user", "one", "two")
    shows(chat, "assistant", "Otherwise.", "Otherwise.")


def test_a_failed_answer_is_no_version(chat: Browser, script: Script) -> None:
    script.status = 400
    chat.send("hi")
    chat.find("#messages .error-box")
    script.says("Fine.")
    chat.click("#messages .error-box button")
    chat.finish()
    shows(chat, "assistant", "Fine.")
    chat.gone(".versions")


def test_an_answer_is_continued(chat: Browser, script: Script) -> None:
    script.says("One, ", "two, ", then_waits=True)
    chat.send("count")
    shows(chat, "assistant", "One, two,")
    chat.type(Keys.ESCAPE)
    chat.finish()
    script.go_on()
    script.says(" three.")
    chat.click('[aria-label="Continue answer"]')
    chat.finish()
    shows(chat, "assistant", "One, two, three.")
    request = script.requests[1]
    assert request["messages"][-1] == {"role": "assistant", "content": "One, two,"}
    assert request["continue_final_message"] is True and request["add_generation_prompt"] is False
    # It is done now, and both parts count.
    chat.gone('[aria-label="Continue answer"]')
    chat.wait(lambda: chat.text(".stats").startswith("4 tokens"))
    chat.ask("more")
    assert "continue_final_message" not in script.requests[2]


def test_any_list_of_messages_becomes_a_tree(chat: Browser) -> None:
    body = """
        return values.map((messages) => {
          const conversation = { child: 7, messages: messages.map((message) => ({ ...message })) };
          module.link(conversation);
          return [module.path(conversation).map(({ id }) => id), conversation.messages.map(({ parent }) => parent)];
        });
    """
    lists: list[list[dict[str, Any]]] = [
        [{}, {}, {}],  # as stored by earlier versions
        [{"id": 1, "parent": None, "child": 3}, {"id": 2, "parent": 1}, {"id": 3, "parent": 1}, {"id": 4, "parent": 2}],
        [{"id": 1, "parent": 2}, {"id": 2, "parent": 1}],  # a cycle
        [{"id": 5, "parent": None}, {"id": 5, "parent": 5}, {"id": "x", "parent": 5}, {"id": -1}, {"id": 1e300}],
        [{"id": 1, "parent": 1, "child": 1}],
        [],
    ]
    assert chat.module("branches.js", body, *lists) == [
        [[1, 2, 3], [None, 1, 2]],
        [[1, 3], [None, 1, 1, 2]],
        [[1, 2], [None, 1]],
        [[5, 6, 7, 8, 9], [None, 5, 6, 7, 8]],
        [[1], [None]],
        [[], []],
    ]


# -- attachments -------------------------------------------------------------------------------------------------


def test_images_are_sent_shown_and_kept(chat: Browser, script: Script, tmp_path: Path) -> None:
    (small := tmp_path / "small.png").write_bytes(png())
    (large := tmp_path / f"large {HOSTILE[:8]}.png".replace("/", "")).write_bytes(png(5000, 1000))
    sees(chat, script)
    attach(chat, small, large)
    chat.ask("What is this?")
    first, second, text = sent(script)[0]
    assert first == {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{b64(png())}"}}
    assert second["image_url"]["url"].startswith("data:image/png;base64,")
    assert text == {"type": "text", "text": "What is this?"}
    chat.gone("#composer-attachments li")
    chat.reload()
    widths = "return [...document.querySelectorAll('.from-user img')].map((image) => image.naturalWidth)"
    chat.becomes(lambda: chat.run(widths), [3, 2560])  # the large one was scaled down
    chat.ask("And now?")
    assert sent(script)[0][:2] == [first, second]
    chat.click(".from-user li:first-child .thumbnail")
    chat.becomes(lambda: chat.run("return document.querySelector('.viewer img').naturalWidth"), 3)
    chat.type(Keys.ESCAPE)
    chat.gone(".viewer")


def b64(data: bytes) -> str:
    return base64.b64encode(data).decode()


def test_a_message_may_be_an_image_alone_and_lose_it(chat: Browser, script: Script, tmp_path: Path) -> None:
    (path := tmp_path / "a.png").write_bytes(png())
    (moving := tmp_path / "b.gif").write_bytes(GIF)
    sees(chat, script)
    chat.wait(lambda: not chat.find("#send").is_enabled())
    attach(chat, path, moving)
    press(chat, "Remove a.png")
    has(chat, "#composer-attachments li", 1)
    chat.click("#send")
    chat.finish()
    (part,) = sent(script)[0]  # as one frame, which any server takes
    assert part["image_url"]["url"].startswith("data:image/png;base64,")
    lists(chat, "b.gif")
    press(chat, "Edit message")
    chat.type("Hm?")
    press(chat, "Remove b.gif")
    chat.type(Keys.ENTER)
    chat.finish()
    assert sent(script) == ["Hm?"]


def test_texts_are_dropped_and_pasted(chat: Browser, script: Script, tmp_path: Path) -> None:
    give = """
        const [target, kind, name, data] = arguments;
        const transfer = new DataTransfer();
        transfer.items.add(new File([data], name, { type: name.endsWith("png") ? "image/png" : "" }));
        const options = { bubbles: true, cancelable: true, dataTransfer: transfer, clipboardData: transfer };
        const event = kind === "paste" ? new ClipboardEvent(kind, options) : new DragEvent(kind, options);
        document.querySelector(target).dispatchEvent(event);
        return event.defaultPrevented;
    """
    assert chat.run(give, "#thread", "dragover", "a.md", "")
    chat.becomes(lambda: chat.text("#drop-hint"), "Drop text files here")
    assert chat.run(give, "#thread", "drop", "a.md", "# A\n```js\n1\n```") and chat.find("#composer")
    has(chat, "#composer-attachments li", 1)
    chat.hidden("#drop-hint")
    chat.run(give, "#composer-input", "paste", "b", "plain")
    has(chat, "#composer-attachments li", 2)
    chat.run(give, "#thread", "drop", "c.png", "x")
    notes(chat, "c.png is an image, which this model does not take.")
    (binary := tmp_path / "d.bin").write_bytes(b"\xff\xfe\0")
    chat.all("#file-picker")[0].send_keys(str(binary))
    notes(chat, "d.bin is neither an image nor a text.")
    chat.ask("Which?")
    assert sent(script) == ["a.md:\n\n````md\n# A\n```js\n1\n```\n````\n\nb:\n\n```\nplain\n```\n\nWhich?"]
    chat.click(".from-user .text-chip")
    chat.becomes(lambda: chat.text(".viewer pre"), "plain")


# -- what is kept ------------------------------------------------------------------------------------------------


def test_conversations_of_earlier_versions_move(chat: Browser, script: Script) -> None:
    old = {"title": "Old", "updated": 5, "model": MODEL, "settings": {"temperature": 0.5}}
    answer = {"role": "assistant", "content": "A.", "status": "streaming", "toolCalls": [{"name": 1}]}
    old["messages"] = [{"role": "user", "content": "Q?"}, answer, {"role": "system"}, None]
    chat.run("localStorage['octavo:/:conversation:abc'] = arguments[0]", json.dumps(old))
    chat.run("localStorage['octavo:/:conversation:bad'] = '{'")
    for _ in range(2):
        chat.open(f"{script.url}/#chat/abc")
        shows(chat, "assistant", "A.")
        chat.wait(lambda: "stopped" in chat.text(".stats"))
        has(chat, ".conversation-title", 1)
        chat.wait(lambda: "conversation:" not in chat.run("return Object.keys(localStorage).join()"))
    chat.ask("more")
    assert sent(script) == ["Q?", "A.", "more"] and script.requests[-1]["temperature"] == 0.5


def test_an_answer_that_was_running_is_kept(chat: Browser, script: Script) -> None:
    script.says("Half ", "an answer", then_waits=True)
    chat.send("go on")
    shows(chat, "assistant", "Half an answer")
    chat.reload()
    shows(chat, "assistant", "Half an answer")
    chat.wait(lambda: "stopped" in chat.text(".stats"))
    script.go_on()


def test_tabs_see_each_others_conversations(chat: Browser, script: Script) -> None:
    first = chat.driver.current_window_handle
    chat.driver.switch_to.new_window("tab")
    other = chat.driver.current_window_handle
    try:
        chat.open(script.url)
        chat.ask("from the other tab")
        chat.driver.switch_to.window(first)
        lists(chat, "from the other tab")  # it is stored after the answer, by a tab that is still open
    finally:
        chat.driver.switch_to.window(other)
        chat.driver.close()
        chat.driver.switch_to.window(first)


def test_storage_that_is_full(chat: Browser, script: Script) -> None:
    quota = {"origin": script.url, "quotaSize": 1}
    chat.driver.execute_cdp_cmd("Storage.overrideQuotaForOrigin", quota)
    try:
        chat.ask("x" * 1000)
        notes(chat, "The browser's storage is full. Export and delete some conversations.")
        assert chat.ask("next") == "Hello world."
    finally:
        chat.driver.execute_cdp_cmd("Storage.overrideQuotaForOrigin", {"origin": script.url})


def test_files_without_a_message_are_forgotten(chat: Browser) -> None:
    body = """
        return (async () => {
          const store = await module.ConversationStore.open();
          for (const id of ["used", "unused"]) await store.files.put(id, new Blob(["x"]));
          const later = Date.now() + 48 * 3600 * 1000;
          Date.now = () => later;
          await store.files.forgetAllBut([{ messages: [{ attachments: [{ file: "used" }] }, {}] }]);
          return [(await store.files.get("used")).size, await store.files.get("unused")];
        })();
    """
    chat.run("window.found = import(new URL('web/conversations.js', document.baseURI))")
    script = f"const done = arguments[0]; window.found.then((module) => {{ {body} }}).then(done)"
    assert chat.driver.execute_async_script(script) == [1, None]


# -- what is found and moved -------------------------------------------------------------------------------------


def test_search(chat: Browser, script: Script) -> None:
    script.says("The Loire, of course.")
    chat.ask("Longest river in France?")
    script.says("Something else.")
    press(chat, "Regenerate answer")
    chat.finish()
    chat.click("#new-chat")
    chat.ask("Tea or coffee")
    chat.type(Keys.CONTROL, "k")
    chat.type("loire RIVER")
    lists(chat, "Longest river in France?")
    chat.becomes(lambda: chat.text(".conversation-snippet mark"), "Loire")
    chat.type(Keys.ENTER)
    # The branch that has the words is shown.
    shows(chat, "assistant", "The Loire, of course.")
    chat.click("#search")
    chat.type(Keys.ESCAPE)
    has(chat, ".conversation-title", 2)
    chat.type("nowhere")
    chat.becomes(lambda: chat.text(".conversations .empty"), "Nothing found")


def test_a_long_list_is_shown_in_parts(chat: Browser, script: Script, tmp_path: Path) -> None:
    messages = [{"role": "user", "content": "x"}]
    (path := tmp_path / "x.json").write_text(json.dumps([{"title": str(i), "messages": messages} for i in range(201)]))
    chat.all("#import-picker")[0].send_keys(str(path))
    has(chat, ".conversation-title", 200)
    chat.run("document.querySelector('.conversations .button').click()")
    has(chat, ".conversation-title", 201)
    chat.gone(".conversations .button")
    chat.becomes(lambda: chat.focused("title"), "200")


def test_export_and_import_of_everything(chat: Browser, script: Script, tmp_path: Path) -> None:
    behaviour = {"behavior": "allow", "downloadPath": str(tmp_path)}
    chat.driver.execute_cdp_cmd("Browser.setDownloadBehavior", behaviour)
    (path := tmp_path / "a.png").write_bytes(png())
    sees(chat, script)
    chat.run("localStorage['octavo:/:prompts'] = JSON.stringify([{ id: '1', title: 'T', text: 'P' }])")
    attach(chat, path)
    chat.ask("first")
    press(chat, "Regenerate answer")
    chat.finish()
    chat.click("#new-chat")
    chat.ask("second")
    chat.click("#export-all")
    (file,) = chat.wait(lambda: list(tmp_path.glob("octavo-chats-*.json")))
    exported = chat.wait(lambda: json.loads(file.read_text()))  # the browser makes the file, then fills it
    assert [len(conversation["messages"]) for conversation in exported["conversations"]] == [2, 3]
    chat.open("about:blank")
    chat.clear(script.url)
    chat.open(script.url)
    chat.becomes(lambda: chat.text(".conversations .empty"), "No conversations yet")
    for expected in ("Imported 2 conversations, 1 prompt.", "Imported 0 conversations, 2 already here."):
        chat.all("#import-picker")[0].send_keys(str(file))
        notes(chat, expected)
    lists(chat, "second", "first")
    chat.click(".conversations li:last-child a")
    chat.becomes(lambda: chat.run("return document.querySelector('.from-user img')?.naturalWidth"), 3)
    chat.becomes(lambda: version(chat), "Version 2 of 2")
    assert "P" in chat.run("return localStorage['octavo:/:prompts']")


def hostile_conversation() -> dict[str, Any]:
    image = {"kind": "image", "type": "image/svg+xml", "file": "x", "name": HOSTILE, "data": "data:text/html,<b>"}
    gone = {**image, "type": "image/png", "data": f"data:image/png;base64,{HOSTILE}"}
    attachments = [image, gone, {"kind": "text", "name": HOSTILE, "text": HOSTILE}, None, {"kind": "text"}]
    user = {"role": "user", "content": HOSTILE, "attachments": attachments, "id": "__proto__"}
    answer = {"role": "assistant", "content": {"a": 1}, "stats": {"tokens": HOSTILE}, "reasoning": HOSTILE}
    return {"id": "../x", "title": HOSTILE, "messages": [user, answer, 5], "settings": {"temperature": HOSTILE}}


def test_files_that_are_no_export(chat: Browser, script: Script, tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    bad = ["", "{", "[]", "null", "7", '{"conversations": 5}', '{"messages": []}', '[{"messages": 1}, null]']
    for text in bad:
        path.write_text(text)
        chat.run("document.getElementById('notices').replaceChildren()")
        chat.all("#import-picker")[0].send_keys(str(path))
        chat.wait(lambda: chat.text(".notice").startswith("x.json was not imported: T"))
    path.write_text(json.dumps([hostile_conversation()]))
    chat.all("#import-picker")[0].send_keys(str(path))
    notes(chat, "Imported 1 conversation.")
    chat.click(".conversations a")
    shows(chat, "user", HOSTILE)
    assert chat.driver.title == "Octavo"
    chat.wait(lambda: "is missing" in chat.text(".from-user .thumbnail"))
    chat.ask("go on")
    assert HOSTILE in sent(script)[0] and "is missing" in sent(script)[0]
    assert "temperature" not in script.requests[-1]


# -- saved prompts -----------------------------------------------------------------------------------------------


def test_saved_prompts(chat: Browser, script: Script) -> None:
    chat.fill("#composer-input", "Translate into Latin: ")
    chat.click("#prompts")
    chat.click("#prompt-new")
    chat.becomes(chat.focused, "prompt-title")
    chat.type("Latin", Keys.TAB, Keys.TAB, Keys.TAB, Keys.ENTER)
    chat.becomes(lambda: chat.texts(".prompt-title"), ["Latin"])
    chat.click("#prompt-new")
    chat.fill("#prompt-text", Keys.CONTROL, "a", Keys.NULL, "Be brief.")
    chat.click("#prompts-dialog [type=submit]")
    chat.becomes(lambda: chat.texts(".prompt-title"), ["Be brief.", "Latin"])
    press(chat, "Use as system prompt: Be brief.")
    chat.gone("#prompts-dialog")
    chat.fill("#composer-input", Keys.CONTROL, "a", Keys.DELETE)
    chat.reload()
    chat.click("#prompts")
    chat.fill("#prompts-filter", "latin", Keys.ENTER)
    chat.gone("#prompts-dialog")
    chat.becomes(chat.focused, "composer-input")
    chat.type("world", Keys.ENTER)
    chat.finish()
    assert sent(script) == ["Be brief.", "Translate into Latin: world"]
    chat.click("#prompts")
    press(chat, "Delete: Latin")
    chat.becomes(lambda: chat.texts(".prompt-title"), ["Be brief."])


def test_the_prompts_fit_a_phone(chat: Browser) -> None:
    chat.resize(390, 700)
    chat.run("localStorage['octavo:/:prompts'] = JSON.stringify([{ id: '1', title: 'T'.repeat(99), text: 'P' }])")
    chat.click("#prompts")
    chat.find("#prompts-dialog")
    assert chat.run("return document.documentElement.scrollWidth") <= 390
    sizes = "return document.getElementById('prompts-dialog').getBoundingClientRect().width"
    assert chat.run(sizes) <= 390 - 16
