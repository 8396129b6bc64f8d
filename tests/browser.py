"A browser without a window, for the tests of pages: Chromium, driven by its debugging protocol."
import base64
import json
import shutil
import subprocess
import time
from pathlib import Path
import pytest
import websocket

NAMES = ('chromium', 'chromium-browser', 'google-chrome')
CHROMIUM = next((path for path in map(shutil.which, NAMES) if path), None)
FLAGS = ['--headless', '--no-sandbox', '--disable-gpu', '--disable-dev-shm-usage',
         '--disable-extensions', '--no-first-run', '--remote-debugging-port=0',
         '--remote-allow-origins=*', '--host-resolver-rules=MAP * ~NOTFOUND']


class Browser:
    "It shows one page at a time. `errors` holds what its console reports and what failed to load."
    def __init__(self, profile):  # folder for its files
        command = [CHROMIUM, *FLAGS, f'--user-data-dir={profile}', 'about:blank']
        silent = dict(stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        self.process = subprocess.Popen(command, **silent)
        port, path = self.wait_for_address(Path(profile)/'DevToolsActivePort')
        address = f'ws://127.0.0.1:{port}{path}'
        self.socket = websocket.create_connection(address, timeout=60)
        self.count = 0
        self.session = None
        self.errors = []
        target = self.call('Target.createTarget', url='about:blank')['targetId']
        attached = self.call('Target.attachToTarget', targetId=target, flatten=True)
        self.session = attached['sessionId']
        for domain in ('Page', 'Runtime', 'Log', 'Network'):
            self.call(f'{domain}.enable')

    def wait_for_address(self, file):
        "Port and path of the debugging protocol, which a started browser writes to a file."
        deadline = time.time() + 60
        while not (file.is_file() and len(file.read_text().split()) == 2):
            if self.process.poll() is not None or time.time() > deadline:
                raise RuntimeError(f'{CHROMIUM} did not start')
            time.sleep(.05)
        return file.read_text().split()

    def call(self, method, **params):
        "Send a command and return its result."
        self.count += 1
        command = {'id': self.count, 'method': method, 'params': params}
        if self.session:
            command['sessionId'] = self.session
        self.socket.send(json.dumps(command))
        message = self.receive()
        while message.get('id') != self.count:
            message = self.receive()
        if 'error' in message:
            raise RuntimeError(f'{method}: {message["error"]["message"]}')
        return message['result']

    def receive(self):
        "The next message; an error report is kept."
        message = json.loads(self.socket.recv())
        event, p = message.get('method'), message.get('params', {})
        if event == 'Runtime.exceptionThrown':
            details = p['exceptionDetails']
            self.errors.append(details.get('exception', {}).get('description') or details['text'])
        if event == 'Log.entryAdded' and p['entry']['level'] in ('error', 'warning'):
            self.errors.append(f'{p["entry"]["text"]} {p["entry"].get("url", "")}')
        if event == 'Runtime.consoleAPICalled' and p['type'] in ('error', 'warning', 'assert'):
            self.errors.append(str([a.get('value') for a in p['args']]))
        if event == 'Network.loadingFailed' and not p.get('canceled'):
            self.errors.append(p['errorText'])
        return message

    def show(self, file, width=1000, dark=False, height=900):
        "Open a file (an '#anchor' may follow its name) in a window of that many pixels."
        self.errors.clear()
        self.width(width, height)
        scheme = {'name': 'prefers-color-scheme', 'value': 'dark' if dark else 'light'}
        self.call('Emulation.setEmulatedMedia', features=[scheme])
        path, hash, anchor = str(file).partition('#')
        # otherwise another anchor of the same page would not load it again
        self.call('Page.navigate', url='about:blank')
        url = Path(path).resolve().as_uri() + hash + anchor
        error = self.call('Page.navigate', url=url).get('errorText')
        if error:
            self.errors.append(error)
        while (self.evaluate('document.readyState') != 'complete'
               or self.evaluate('location.href') == 'about:blank'):
            time.sleep(.01)
        return self

    def width(self, width, height=900):
        "Resize the window."
        self.call('Emulation.setDeviceMetricsOverride', width=width, height=height,
                  deviceScaleFactor=1, mobile=False)

    def evaluate(self, script):
        "The value of a JavaScript expression on the page; a promise is awaited."
        found = self.call('Runtime.evaluate', expression=script,
                          returnByValue=True, awaitPromise=True)
        if 'exceptionDetails' in found:
            exception = found['exceptionDetails'].get('exception', {})
            raise RuntimeError(exception.get('description', script))
        return found['result'].get('value')

    def picture(self, file, whole=False):
        "Write a PNG of the window, or of the whole page."
        shot = self.call('Page.captureScreenshot', captureBeyondViewport=whole)
        Path(file).write_bytes(base64.b64decode(shot['data']))

    def close(self):
        self.socket.close()
        self.process.terminate()
        self.process.wait(30)


@pytest.fixture(scope='session')
def browser(tmp_path_factory):
    "Tests that use it are skipped where there is no Chromium."
    if not CHROMIUM:
        pytest.skip('there is no Chromium: apt-get install chromium')
    found = Browser(tmp_path_factory.mktemp('browser'))
    yield found
    found.close()
