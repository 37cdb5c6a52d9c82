// Drives a device built on one of Microsoft's SDKs through all that a device does.
//
//   node check_device.js PROGRAM ARGUMENT...
//
// registers and runs the device that the environment describes (see hub.js); DEVICE_TRANSPORT is
// mqtt or websocket. With a short token the check is about its renewal alone.
'use strict';

const { assert, call, events, fault, register, registry, run, start, step, twinOf, until } = require('./hub.js');

const { DEVICE_ID: device, DEVICE_CREDENTIAL: credential } = process.env;
const transport = process.env.DEVICE_TRANSPORT === 'websocket' ? 'webSocket' : 'mqtt';

/** Waits for the device's n-th connection, counted from 1. */
const connection = (n) => until(`connection ${n} of ${device}`, async () => (await events(device, 'connected'))[n - 1]);

/** Writes desired properties and waits until the device has told what it was told. */
async function desire(desired) {
  const { responseBody } = await registry.updateTwin(device, { properties: { desired } }, '*');
  const version = responseBody.properties.desired.$version;
  const expected = { ...desired, $version: version };
  const told = await until(`the device to be told of desired version ${version}`, async () => {
    const { lastPatch } = (await twinOf(device)).properties.reported;
    const patch = lastPatch && JSON.parse(lastPatch);
    return patch?.$version === version && patch;
  });
  assert.deepEqual(told, expected);
}

async function methods() {
  const payloads = [
    { fwPackageUri: 'https://example.org/fw.bin', list: [1, { a: null }] },
    '{"fwPackageUri":"https://example.org/fw.bin"}',
    'https://example.org/a b.bin',
    'grüße \u{1F600} "quoted" \\ \n',
    null, 0, false, [], {},
  ];
  for (const payload of payloads) {
    assert.deepEqual(await call(device, 'echo', payload), { status: 200, payload: { echo: payload } });
  }
  assert.deepEqual(await call(device, 'refuse', {}), { status: 418, payload: { why: 'asked to' } });
  const many = await Promise.all(payloads.map((payload) => call(device, 'echo', payload)));
  assert.deepEqual(many.map((answer) => answer.payload.echo), payloads);
}

async function reports() {
  const before = await twinOf(device);
  const patch = { iothubDM: { firmwareUpdate: { status: 'downloading', error: null, times: [1, 2] } }, old: 'x' };
  assert.deepEqual(await call(device, 'report', patch), { status: 200, payload: { ok: true } });
  let twin = await twinOf(device);
  assert.deepEqual(twin.properties.reported.iothubDM, { firmwareUpdate: { status: 'downloading', times: [1, 2] } });
  assert.equal(twin.properties.reported.$version, before.properties.reported.$version + 1);
  assert.equal(twin.etag, before.etag, 'reports leave the ETag alone');
  assert.ok(twin.properties.reported.$metadata.iothubDM.firmwareUpdate.status.$lastUpdated);

  assert.equal((await call(device, 'report', { old: null, iothubDM: { more: true } })).status, 200);
  twin = await twinOf(device);
  assert.equal('old' in twin.properties.reported, false);
  assert.equal(twin.properties.reported.iothubDM.firmwareUpdate.status, 'downloading');

  for (const wrong of [{ 'a.b': 1 }, { $version: 3 }, { text: 'x'.repeat(5000) }, { list: [null] }]) {
    const answer = await call(device, 'report', { ...wrong, good: 'part' });
    assert.equal(answer.status, 500, `${JSON.stringify(wrong).slice(0, 80)} must be refused`);
  }
  assert.deepEqual((await twinOf(device)).properties.reported, twin.properties.reported);
}

async function desires() {
  await desire({ interval: 30, firmware: { fwVersion: '2.8.5', fwPackageURI: 'https://example.org/2.8.5' } });
  await desire({ interval: null, firmware: { fwPackageURI: null, fwSize: 12 } });
  const { status, payload } = await call(device, 'readTwin', null);
  assert.equal(status, 200);
  assert.deepEqual(payload.desired.firmware, { fwVersion: '2.8.5', fwSize: 12 });
  assert.equal('interval' in payload.desired, false);
  assert.equal(payload.desired.$version, (await twinOf(device)).properties.desired.$version);
  assert.ok(payload.reported.ready);
}

async function telemetry() {
  assert.equal((await call(device, 'send', { temperature: 21.5 })).status, 200);
  const message = await until('the message', async () => (await events(device, 'telemetry'))[0]);
  assert.deepEqual(JSON.parse(message.text), { temperature: 21.5 });
  assert.equal(message.properties['a key'], 'a value / with signs & more');
  assert.equal(message.properties['$.ct'], 'application/json');
}

/** After a connection was lost, everything works again without the device's program doing anything. */
async function again(n, cause) {
  await fault(device, { fault: cause });
  const { sessionPresent, clean } = await connection(n);
  assert.deepEqual({ sessionPresent, clean }, { sessionPresent: true, clean: false });
  // Not every SDK subscribes again: both ways live from the kept session.
  assert.deepEqual(await call(device, 'echo', cause, { connectTimeoutInSeconds: 20 }), { status: 200, payload: { echo: cause } });
  await desire({ [cause]: n });
  assert.equal((await call(device, 'report', { [cause]: n })).status, 200);
}

/** What was desired while the device could not connect, it learns when it is back. */
async function away(n, refused) {
  await fault(device, { fault: 'refuseConnections', code: 3 });
  await fault(device, { fault: 'dropNow' });
  await until('a refused connection', async () => (await events(device, 'authFailed')).length > refused);
  const { responseBody } = await registry.updateTwin(device, { properties: { desired: { whileAway: n } } }, '*');
  await fault(device, { fault: 'refuseConnections', code: null });
  await connection(n);
  // Python's SDK reads the twin by itself when it is back; with Node's the program must do it.
  const { payload } = await call(device, 'readTwin', null, { connectTimeoutInSeconds: 20 });
  assert.equal(payload.desired.whileAway, n);
  const told = await until('the device to tell of it', async () => {
    const { lastPatch } = (await twinOf(device)).properties.reported;
    const patch = JSON.parse(lastPatch);
    return patch.$version === responseBody.properties.desired.$version && patch;
  });
  assert.equal(told.whileAway, n);
}

async function wrongKey(program, args, { DEVICE_CONNECTION }) {
  const key = Buffer.alloc(32).toString('base64');
  const wrong = DEVICE_CONNECTION.replace(/SharedAccessKey=[^;]*/, `SharedAccessKey=${key}`);
  assert.equal(await start(program, args, { DEVICE_CONNECTION: wrong }).ended, 1);
  const [{ code, reason }] = await events(device, 'authFailed');
  assert.deepEqual([code, reason], [5, 'wrong signature']);
}

async function renewal() {
  const second = await connection(2);
  assert.equal(second.sessionPresent, true);
  await call(device, 'echo', 'renewed', { connectTimeoutInSeconds: 20 });
  await desire({ renewed: true });
  await connection(3);
  await call(device, 'echo', 'renewed again', { connectTimeoutInSeconds: 20 });
  assert.deepEqual(await events(device, 'authFailed'), []);
}

run(async () => {
  const [program, ...args] = process.argv.slice(2);
  const settings = await register();
  if (credential === 'token') await step('is refused with a wrong key', () => wrongKey(program, args, settings));
  const refused = (await events(device, 'authFailed')).length;
  const { ended } = start(program, args, settings);
  const ready = until('the device to report', async () => (await twinOf(device)).properties.reported.ready);
  const early = ended.then((code) => { throw new Error(`the device ended with ${code}`); });
  await step('connects and reports', () => Promise.race([ready, early]));
  const first = await connection(1);
  assert.deepEqual([first.transport, first.clean, first.sessionPresent], [transport, false, false]);
  assert.equal((await twinOf(device)).connectionState, 'Connected');

  if (credential === 'shortToken') {
    await step('renews its token', renewal);
  } else {
    await step('answers methods', methods);
    await step('reports properties', reports);
    await step('is told of desired properties', desires);
    await step('sends a message', telemetry);
    await step('comes back after a lost connection', () => again(2, 'dropNow'));
    await step('learns what it missed', () => away(3, refused));
    if (credential === 'token') await step('comes back after its token expired', () => again(4, 'expireTokenNow'));
  }
  await step('leaves', async () => {
    assert.equal((await call(device, 'quit', null)).status, 200);
    early.catch(() => {});
    assert.equal(await ended, 0);
    await until('the hub to see it leave', async () => (await twinOf(device)).connectionState === 'Disconnected');
  });
});
