"A real browser without a window, for the tests of pages: Chromium, told what to do over its own debugging protocol."
import base64
import json
import shutil
import subprocess
import time
from pathlib import Path
import pytest
import websocket

CHROMIUM = next((p for n in ('chromium', 'chromium-browser', 'google-chrome') if (p := shutil.which(n))), None)


class Browser:
    "One page that is shown in it at a time. What the console said against a page, and what could not be loaded, is in `errors`."
    def __init__(self, profile):
        flags = ['--headless', '--no-sandbox', '--disable-gpu', '--disable-dev-shm-usage', '--disable-extensions', '--no-first-run', '--remote-debugging-port=0',
                 '--remote-allow-origins=*', '--host-resolver-rules=MAP * ~NOTFOUND', f'--user-data-dir={profile}']
        self.process = subprocess.Popen([CHROMIUM, *flags, 'about:blank'], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        port, until = Path(profile)/'DevToolsActivePort', time.time() + 60
        while not (port.is_file() and len(port.read_text().split()) == 2):
            if self.process.poll() is not None or time.time() > until:
                raise RuntimeError(f'{CHROMIUM} did not start')
            time.sleep(.05)
        port, path = port.read_text().split()
        self.socket = websocket.create_connection(f'ws://127.0.0.1:{port}{path}', timeout=60)
        self.count, self.session, self.errors = 0, None, []
        target = self.tell('Target.createTarget', url='about:blank')['targetId']
        self.session = self.tell('Target.attachToTarget', targetId=target, flatten=True)['sessionId']
        for domain in ('Page', 'Runtime', 'Log', 'Network'):
            self.tell(f'{domain}.enable')

    def tell(self, method, **params):
        "A command, and its answer."
        self.count += 1
        self.socket.send(json.dumps({'id': self.count, 'method': method, 'params': params, **({'sessionId': self.session} if self.session else {})}))
        while (said := self.hear()).get('id') != self.count:
            pass
        if 'error' in said:
            raise RuntimeError(f'{method}: {said["error"]["message"]}')
        return said['result']

    def hear(self):
        "The next message; complaints are kept."
        said = json.loads(self.socket.recv())
        what, p = said.get('method'), said.get('params', {})
        if what == 'Runtime.exceptionThrown':
            self.errors.append(p['exceptionDetails'].get('exception', {}).get('description') or p['exceptionDetails']['text'])
        if what == 'Log.entryAdded' and p['entry']['level'] in ('error', 'warning'):
            self.errors.append(f'{p["entry"]["text"]} {p["entry"].get("url", "")}')
        if what == 'Runtime.consoleAPICalled' and p['type'] in ('error', 'warning', 'assert'):
            self.errors.append(str([a.get('value') for a in p['args']]))
        if what == 'Network.loadingFailed' and not p.get('canceled'):
            self.errors.append(p['errorText'])
        return said

    def show(self, file, width=1000, dark=False, height=900):
        "Open a file (a '#place' may follow its name) in a window so many pixels wide."
        self.errors.clear()
        self.width(width, height)
        self.tell('Emulation.setEmulatedMedia', features=[{'name': 'prefers-color-scheme', 'value': 'dark' if dark else 'light'}])
        path, _, place = str(file).partition('#')
        self.tell('Page.navigate', url='about:blank')   # otherwise another place of the same page would not load it again
        if wrong := self.tell('Page.navigate', url=Path(path).resolve().as_uri() + f'#{place}'*bool(place)).get('errorText'):
            self.errors.append(wrong)
        while self.ask('document.readyState') != 'complete' or self.ask('location.href') == 'about:blank':
            time.sleep(.01)
        return self

    def width(self, width, height=900):
        "Make the window so wide."
        self.tell('Emulation.setDeviceMetricsOverride', width=width, height=height, deviceScaleFactor=1, mobile=False)

    def ask(self, script):
        "What an expression is, there."
        found = self.tell('Runtime.evaluate', expression=script, returnByValue=True, awaitPromise=True)
        if 'exceptionDetails' in found:
            raise RuntimeError(found['exceptionDetails'].get('exception', {}).get('description', script))
        return found['result'].get('value')

    def picture(self, file, whole=False):
        "A PNG of the window, or of the whole page."
        Path(file).write_bytes(base64.b64decode(self.tell('Page.captureScreenshot', captureBeyondViewport=whole)['data']))

    def close(self):
        self.socket.close()
        self.process.terminate()
        self.process.wait(30)


@pytest.fixture(scope='session')
def browser(tmp_path_factory):
    "Tests that ask for it are skipped where there is none."
    if not CHROMIUM:
        pytest.skip('there is no Chromium: apt-get install chromium')
    found = Browser(tmp_path_factory.mktemp('browser'))
    yield found
    found.close()
