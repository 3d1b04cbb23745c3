"""Replies that must be refused: (reply, words of the reason) per grammar. Shared by the tests and by the fuzzer.

Injected code, nesting, huge and unwritten numbers, other alphabets' digits, missing quotes and brackets, patterns that
make backtracking readers slow, replies beyond every length.
"""

from __future__ import annotations

from agentkv.grammars.base import MAX_REPLY

_LONG = "x" * (MAX_REPLY + 1)
_INJECTED = "__import__('os').system('id')"

UI_TARS: tuple[tuple[str, str], ...] = (
    ("", "no action found"),
    (" \n\t", "no action found"),
    ("I would click there.", "'I' is not an action"),
    ("<think>\nAction: wait()", "the <think> block does not end"),
    ("Action: open_url(url='x')", "'open_url' is not an action; known are click"),
    ("Action: " + _INJECTED, "'__import__' is not an action"),
    (f"Action: click(start_box={_INJECTED})", "expected ',', found '('"),
    (f'Action: click(start_box="{_INJECTED}")', "is not a point"),
    ("Action: click(start_box=f'(1,2)')", "expected ','"),
    ("Action: click(*['(1,2)'])", "expected an argument"),
    ("Action: click(**{})", "expected an argument"),
    ("Action: [].__class__", "no action found"),
    ("Action: click()", "click needs start_box"),
    ("Action: click('(1,2)')", "expected an argument"),
    ("Action: click(start_box='(1,2)', start_box='(3,4)')", "'start_box' is given twice"),
    ("Action: click(start_box='(1,2)', point='(3,4)')", "click has two points"),
    ("Action: click(" + ", ".join(f"a{n}='1'" for n in range(13)) + ")", "more than 12 arguments"),
    ("Action: click(start_box='(1,2)", "does not end"),
    ("Action: type(content='x'", "does not end"),
    ("Action: click start_box='(1,2)'", "expected '(', found 's'"),
    ("Action: click", "found the end of the reply"),
    ("Action: click(start_box='(9**9**9,1)')", "is not a point"),
    ("Action: click(start_box='(nan,1)')", "is not a point"),
    ("Action: click(start_box='(inf,1)')", "is not a point"),
    ("Action: click(start_box='(1e3,1)')", "is not a point"),
    ("Action: click(start_box='(0x10,1)')", "is not a point"),
    ("Action: click(start_box='(1_0,1)')", "is not a point"),
    ("Action: click(start_box='(1,2,3)')", "is not a point"),
    ("Action: click(start_box='(True,2)')", "is not a point"),
    ("Action: click(start_box='(٣,٤)')", "is not a point"),
    ("Action: click(start_box='(１,２)')", "is not a point"),
    (f"Action: click(start_box='({'9' * 5000},1)')", "is not a point"),
    ("Action: click(start_box='" + "(" * 10_000 + "')", "is not a point"),
    ("Action: click(start_box='(-40,1)')", "x=-40 is outside the image"),
    ("Action: click(start_box='(1,300000)')", "y=300000 is outside"),
    ("Action: scroll(start_box='(1,2)', direction='sideways')", "'sideways' is not one of up, down, left, right"),
    ("Action: scroll(start_box='(1,2)')", "scroll needs direction"),
    ("Action: drag(start_box='(1,2)')", "drag needs end_box"),
    ("Action: hotkey(key='ctrl bogus')", "'bogus' is not a key"),
    ("Action: hotkey(key='ctrl é')", "'é' is not a key"),
    ("Action: press(key='ctrl c')", "press names 2 keys, not one"),
    ("Action: release(key='')", "does not name 1 to 5 keys"),
    ("Action: hotkey(key='a b c d e f')", "does not name 1 to 5 keys"),
    ("Action: type(content='x') and ('y') so", "does not end"),
    ("Action: type(content='f('a')\nreturn g('b')')", "may end on this line or on a later one"),
    ("Action: scroll(direction='down', amount='far')", "amount 'far' is not a number"),
    ("Action: type(text='x')", "type needs content"),
    ("Action: open_app()", "open_app needs app_name"),
    ("Action: wait()\0", "NUL"),
    (_LONG, "characters, more than"),
    ("Action: " + "wait(" * 13_000, "expected '=', found '('"),
    ("Action: type(content='" + "'," * 32_000, "does not end"),
    ("Action: type(content='" + "' " * 32_000, "does not end"),
    ("Action: type(content='" + "\\'" * 32_000, "does not end"),
    ("Action: drag(start_box='" + "',a" * 20_000, "does not end"),
    (" " * 65_000, "no action found"),
)


def _fenced(code: str) -> str:
    return f"## Thought:\nNow.\n\n## Action:\nDo it.\n\n## Code:\n```python\n{code}\n```"


OPENCUA: tuple[tuple[str, str], ...] = (
    ("", "no code found"),
    ("I would click there.", "no code found"),
    ("<think>\n```python\ncomputer.wait()\n```", "the <think> block does not end"),
    ("```json\n{}\n```", "'json', not python or code"),
    ("```python\n```", "the code does nothing"),
    *(
        (_fenced(code), reason)
        for code, reason in (
            ("import pyautogui", "the code does nothing"),
            ("# nothing", "the code does nothing"),
            (_INJECTED, "is not allowed; write calls of pyautogui"),
            (f"pyautogui.click(x={_INJECTED}, y=1)", "a nested call is not allowed"),
            ("pyautogui.click(x=open('f'), y=1)", "a nested call is not allowed"),
            (f"pyautogui.click(1, 2)\n{_INJECTED}", "is not allowed"),
            ("pyautogui.click(1, 2); import os", "an import is not allowed"),
            ("import pyautogui as os", "an import is not allowed"),
            ("import os", "an import is not allowed"),
            ("from time import sleep", "an import is not allowed"),
            ("os.system('id')", "'os' is not one of pyautogui"),
            ("pyautogui.__class__('x')", "'pyautogui.__class__' is not an action"),
            ("pyautogui.click.__globals__()", "is not allowed"),
            ("[].__class__", "the attribute '__class__' is not allowed"),
            ("pyautogui.click(*[1, 2])", "a starred argument is not allowed"),
            ("pyautogui.click(**{'x': 1})", "a starred argument is not allowed"),
            ("pyautogui.write(f'{1 + 1}')", "an f-string is not a plain string"),
            ("pyautogui.write(rf'{1}')", "an f-string is not a plain string"),
            ("pyautogui.write(b'x')", "a string with the prefix 'b'"),
            ("pyautogui.write('a' + 'b')", "arithmetic is not allowed"),
            ("pyautogui.write('a' * 9)", "arithmetic is not allowed"),
            ("pyautogui.write('%s' % 1)", "arithmetic is not allowed"),
            ("pyautogui.write(text)", "the name 'text' is not allowed"),
            ("pyautogui.write(message=lambda: 1)", "a lambda is not allowed"),
            ("pyautogui.click(1 < 2, 3)", "a comparison is not allowed"),
            ("pyautogui.click([1, 2][0], 3)", "a subscript is not allowed"),
            ("pyautogui.click((1, 2))", "Python's Tuple is not allowed"),
            ("pyautogui.press({'a'})", "a set is not allowed"),
            ("pyautogui.press([x for x in 'ab'])", "Python's ListComp is not allowed"),
            ("pyautogui.click(x := 1, 2)", "an assignment is not allowed"),
            ("x = 1", "an assignment is not allowed"),
            ("for i in 'ab': pyautogui.press(i)", "a loop is not allowed"),
            ("if True:\n    pyautogui.click(1, 2)", "Python's If is not allowed"),
            ("def f(): pass", "Python's FunctionDef is not allowed"),
            ("'just text'", "a constant of type str is not allowed"),
            ("pyautogui.click(9**9**9, 1)", "arithmetic is not allowed"),
            ("pyautogui.click(float('nan'), 1)", "a nested call is not allowed"),
            ("pyautogui.click(nan, 1)", "the name 'nan' is not allowed"),
            ("pyautogui.click(1e999, 1)", "is not a finite number"),
            ("pyautogui.click(1j, 1)", "a constant of type complex is not allowed"),
            (f"pyautogui.click({'9' * 4000}, 1)", "is not a finite number"),
            (f"pyautogui.click(0x{'f' * 4000}, 1)", "is not a finite number"),
            (f"pyautogui.click({'9' * 5000}, 1)", "more than 4096 characters outside its strings"),
            ("pyautogui.click(--1, 1)", "Python's UnaryOp is not allowed"),
            ("pyautogui.click(True, 1)", "x is bool, not a number"),
            ("pyautogui.click('1', 1)", "x is str, not a number"),
            ("pyautogui.click(1)", "y is NoneType, not a number"),
            ("pyautogui.click(-400, 1)", "x=-400 is outside the image"),
            ("pyautogui.click(1, 2, x=3)", "argument 'x' is given twice"),
            ("pyautogui.click(x=1, x=2, y=3)", "argument 'x' is given twice"),
            ("pyautogui.click(1, 2, 1, 0, 'left', 0, 7)", "takes at most 6 arguments, not 7"),
            ("pyautogui.click(1, 2, clicks=4)", "clicks=4 is not a whole number from 1 to 3"),
            ("pyautogui.click(1, 2, clicks=2, button='right')", "2 clicks of the button 'right' are not an action"),
            ("pyautogui.click(1, 2, button='side')", "1 clicks of the button 'side' are not an action"),
            ("pyautogui.dragTo(1, 2, button='right')", "with the button 'right' is not an action"),
            ("pyautogui.moveTo()", "pyautogui.moveTo needs x and y"),
            ("pyautogui.write(5)", "is int, not text"),
            ("pyautogui.write(message='a', text='b')", "argument 'message' is given twice"),
            ("pyautogui.write('\\x00')", "a NUL character or half a character"),
            ("pyautogui.write('\\ud800')", "a NUL character or half a character"),
            ("pyautogui.press('hyper')", "'hyper' is not a key"),
            ("pyautogui.press('a', presses=1000000000)", "is not a finite number below a million"),
            ("pyautogui.press('a', presses=21)", "presses=21 is not a whole number from 1 to 20"),
            ("pyautogui.press(['a', 1])", "Python's List is not allowed"),
            ("pyautogui.hotkey()", "keys is not a list of key names"),
            ("pyautogui.hotkey('a', 'b', 'c', 'd', 'e', 'f')", "6 keys were named, not 1 to 5"),
            ("pyautogui.hotkey(keys=['a'], key1='b')", "has keys and key1"),
            ("pyautogui.scroll(1.5)", "clicks=1.5 is not a whole number"),
            ("pyautogui.scroll()", "clicks is NoneType, not a number"),
            ("pyautogui.hscroll(-99999)", "clicks=-99999 is not a whole number"),
            ("computer.terminate()", "status of type NoneType is not success or failure"),
            ("computer.terminate(status='done')", "status 'done' is not success or failure"),
            ("time.sleep(-1)", "seconds=-1 is not a time to wait"),
            ("time.time()", "'time.time' is not an action"),
            ("browser.select_option('a')", "'browser.select_option' is known but unsupported"),
            ("mobile.home()", "'mobile.home' is known but unsupported"),
            ("answer('42')", "a call of 'answer' is not allowed"),
            ("pyautogui.click(١, ٢)", "not ASCII"),
            ("ｐyautogui.click(1, 2)", "not ASCII"),
            ("pyautogui.click(1, 2", "the code is not Python"),
            ("pyautogui.click 1, 2", "the code is not Python"),
            ("pyautogui.write('abc", "a string does not end"),
            ("pyautogui.write('abc\nimport os')", "a string does not end"),
            ('pyautogui.write("""abc', "a string does not end"),
            ("pyautogui.click(1, 2)" + "(" * 10_000, "nests brackets deeper than 4"),
            ("[" * 30_000, "nests brackets deeper than 4"),
            ("-" * 4000 + "1", "not Python: RecursionError"),
            ("-" * 30_000 + "1", "more than 4096 characters outside its strings"),
            ("a." * 2000 + "b", "the attribute 'b' is not allowed"),
            ("'\\'" * 16_000, "more than 4096 characters outside its strings"),
            ("'" + "\\'" * 30_000, "a string does not end"),
            ("#\n" * 30_000, "more than 4096 characters outside its strings"),
            ("computer.wait()\n" * 100, "the code has 100 actions, more than 50"),
            ("computer.wait()\n" * 4000, "more than 4096 characters outside its strings"),
        )
    ),
    ("```" * 20_000, "no code found"),
    (_fenced("computer.wait()") + "\0", "NUL"),
    (_LONG, "characters, more than"),
)


def _tagged(json: str) -> str:
    return f"<tool_call>\n{json}\n</tool_call>"


def _called(arguments: str) -> str:
    return _tagged('{"name": "computer_use", "arguments": {' + arguments + "}}")


TOOL_CALL: tuple[tuple[str, str], ...] = (
    ("", "no <tool_call> found"),
    ("I would click there.", "no <tool_call> found"),
    ("<think><tool_call>", "the <think> block does not end"),
    ("<tool_call>", "not JSON: Expecting value"),
    (_tagged(""), "not JSON: Expecting value"),
    (_tagged("{'name': 'computer_use'}"), "not an object with a name and arguments"),
    (_tagged("{'name': 'computer_use', 'arguments': open('f')}"), "not JSON: Expecting property name"),
    (_tagged("{'name': 'computer_use', 'arguments': {'action': 'type', 'text': f'{1}'}}"), "not JSON"),
    ("<tool_call><function=computer_use><parameter=action>type</parameter><parameter=text>a", "does not end"),
    ("<tool_call><function=computer_use><parameter=action>wait</parameter>", "expected </function>"),
    ("<tool_call><function=shell><parameter=cmd>id</parameter></function>", "'shell' is not a tool"),
    ("<tool_call>" + "<function=a>" * 5_000, "expected </function>"),
    (_tagged(_INJECTED), "not JSON"),
    (_tagged("[" * 30_000), "not JSON: nested too deeply"),
    (_tagged('{"a":' * 12_000), "not JSON: nested too deeply"),
    (_tagged("[1, 2]"), "not an object with a name and arguments"),
    (_tagged('{"name": "computer_use"}'), "not an object with a name and arguments"),
    (_tagged('{"name": "computer_use", "arguments": {}, "id": 1}'), "of type NoneType is not an action"),
    (_tagged('{"name": "shell", "arguments": {"cmd": "id"}}'), "'shell' is not a tool; the only one is computer_use"),
    (_tagged('{"name": ["computer_use"], "arguments": {}}'), "of type list is not the name of a tool"),
    (_tagged('{"name": "computer_use", "arguments": "wait"}'), "not JSON: Expecting value"),
    (_tagged('{"name": "computer_use", "arguments": [1]}'), "the arguments are of type list, not an object"),
    (_called('"action": "wait", "time": 1') + "\0", "NUL"),
    *(
        (_called(arguments), reason)
        for arguments, reason in (
            ("", "of type NoneType is not an action"),
            ('"action": "exec", "code": "id"', "'exec' is not an action; known are key"),
            ('"action": ["wait"]', "of type list is not an action"),
            ('"action": "wait", "action": "wait", "time": 1', "a key is given twice"),
            ('"action": "left_click", "coordinate": [1]', "is not a point"),
            ('"action": "left_click", "coordinate": [1, 2, 3]', "is not a point"),
            ('"action": "left_click", "coordinate": {"x": 1}', "of type dict is not a point"),
            ('"action": "left_click", "coordinate": [true, 2]', "x is bool, not a number"),
            ('"action": "left_click", "coordinate": [null, 2]', "x is NoneType, not a number"),
            ('"action": "left_click", "coordinate": [[1], 2]', "x is list, not a number"),
            ('"action": "left_click", "coordinate": [NaN, 2]', "NaN is not a number of JSON"),
            ('"action": "left_click", "coordinate": [-Infinity, 2]', "-Infinity is not a number of JSON"),
            ('"action": "left_click", "coordinate": [1e999, 2]', "x is not a finite number"),
            (f'"action": "left_click", "coordinate": [{"9" * 4000}, 2]', "x is not a finite number"),
            (f'"action": "left_click", "coordinate": [{"9" * 40_000}, 2]', "Exceeds the limit"),
            ('"action": "left_click", "coordinate": [9**9, 2]', "not JSON"),
            ('"action": "left_click", "coordinate": [٣, 2]', "not JSON"),
            ('"action": "left_click", "coordinate": [-400, 2]', "x=-400 is outside the image"),
            ('"action": "left_click", "coordinate": ' + "[" * 500 + "]" * 500, "is not a point"),
            ('"action": "type"', "type needs text"),
            ('"action": "type", "text": "\\u0000"', "a NUL character or half a character"),
            ('"action": "type", "text": "\\ud800"', "a NUL character or half a character"),
            ('"action": "type", "text": "abc', "not JSON"),
            ('"action": "key", "keys": [1]', "is not a list of key names"),
            ('"action": "key", "keys": []', "0 keys were named, not 1 to 5"),
            ('"action": "key", "keys": ["hyper"]', "'hyper' is not a key"),
            ('"action": "scroll"', "scroll needs pixels"),
            ('"action": "scroll", "pixels": 1e300', "pixels is not a finite number"),
            ('"action": "wait", "time": -1', "time=-1 is not a time to wait"),
            ('"action": "terminate", "status": "done"', "status 'done' is not success or failure"),
            ('"action": "answer", "text": null', "answer needs text"),
        )
    ),
    ("<tool_call>" * 5_000, "not JSON"),
    (_tagged('"' + "\\" * 60_001), "not JSON"),
    (_LONG, "characters, more than"),
)


def _noted(action: str) -> str:
    return '{"note": "", "thought": "", "action": ' + action + "}"


HOLO: tuple[tuple[str, str], ...] = (
    ("", "no object with note, thought and action found"),
    ("<think>" + _noted("{}"), "the <think> block does not end"),
    (_noted("{}"), "of type NoneType is not an action"),
    (_noted('"click"'), "the action is 'click', not an object"),
    (_noted('{"action": "exec"}'), "'exec' is not an action; known are click_element"),
    (_noted('{"action": "restart"}'), "a running task cannot begin anew"),
    (_noted('{"action": "click_element", "x": 1}'), "y is NoneType, not a number"),
    (_noted('{"action": "click_element", "x": true, "y": 2}'), "x is bool, not a number"),
    (_noted('{"action": "click_element", "x": 1, "y": 3000}'), "y=3000 is outside the image"),
    (_noted('{"action": "write_element_abs", "x": 1, "y": 2}'), "content is NoneType, not text"),
    (_noted('{"action": "write_element_abs", "x": 1, "y": 2, "content": "ab'), "not JSON"),
    (_noted('{"action": "scroll", "direction": "far"}'), "'far' is not one of down"),
    (_noted('{"action": "wait", "seconds": -1}'), "seconds=-1 is not a time to wait"),
    (_noted('{"action": "answer"}'), "content is NoneType, not text"),
    (_noted('{"action": "wait", "action": "wait"}'), "a key is given twice"),
    ('{"note": ' * 7_000, "not JSON"),
    (_noted("[" * 30_000), "not JSON: nested too deeply"),
    (_LONG, "characters, more than"),
)

MAI_UI: tuple[tuple[str, str], ...] = (
    ("", "no <tool_call> found"),
    ("<thinking><tool_call>", "the <thinking> block does not end"),
    (_called('"action": "wait"'), "'computer_use' is not a tool; the only one is mobile_use"),
    *(
        (_called(arguments).replace("computer_use", "mobile_use"), reason)
        for arguments, reason in (
            ('"action": "click"', "click needs coordinate"),
            ('"action": "swipe", "direction": "far"', "direction 'far' is not up or down"),
            ('"action": "swipe"', "swipe needs direction"),
            ('"action": "system_button", "button": "menu"', "a web page has no menu button"),
            ('"action": "system_button", "button": "power"', "button 'power' is not back or"),
            ('"action": "terminate", "status": "done"', "status 'done' is not success"),
            ('"action": "mcp_call"', "'mcp_call' is not an action"),
        )
    ),
    ("<answer>[1, 2]</answer>", "the answer is no object with a coordinate"),
    ('<answer>{"coordinate": [1]}</answer>', "is not a point"),
    ("<answer>" * 8_000, "not JSON"),
)

FARA: tuple[tuple[str, str], ...] = tuple(
    (_called(arguments), reason)
    for arguments, reason in (
        ('"action": "visit_url"', "visit_url needs url"),
        ('"action": "web_search", "query": 1.5', "query is float, not text"),
        ('"action": "type", "text": "a", "press_enter": "maybe"', "press_enter 'maybe' is not true or false"),
        ('"action": "type", "coordinate": [1, 2]', "type needs text"),
        ('"action": "pause_and_memorize_fact"', "needs fact"),
        ('"action": "terminate", "status": "done"', "status 'done' is not success"),
    )
)

GUI_OWL: tuple[tuple[str, str], ...] = (
    (_called('"action": "click", "label": 3').replace("computer_use", "browser_use"), "points at labels drawn on"),
    (_called('"action": "click"').replace("computer_use", "mobile_use"), "click needs coordinate"),
    (_tagged('{"name": "shell", "arguments": {}}'), "'shell' is not a tool; known are computer_use, mobile_use"),
)

REFUSED = {
    "ui_tars": UI_TARS,
    "opencua": OPENCUA,
    "evocua_s1": OPENCUA,
    "tool_call": TOOL_CALL,
    "tool_call_xml": TOOL_CALL,
    "evocua_s2": TOOL_CALL,
    "gui_owl": GUI_OWL,
    "mai_ui": MAI_UI,
    "fara": FARA,
    "holo": HOLO,
}
