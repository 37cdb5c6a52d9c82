// Drives the service side with azure-iothub: registry, twins, queries and methods that fail.
//
//   node check_service.js PROGRAM ARGUMENT...
//
// The program is a device (see device.js) for the calls that need one online; the environment is
// that of check_device.js.
'use strict';

const { assert, call, refusal, register, registry, run, start, step, twinOf, until } = require('./hub.js');

const online = process.env.DEVICE_ID;
const body = async (promise) => (await promise).responseBody;

async function identities() {
  const primaryKey = Buffer.alloc(32, 1).toString('base64');
  const secondaryKey = Buffer.alloc(32, 2).toString('base64');
  const made = await body(registry.create({ deviceId: 'made-1' }));
  assert.equal(made.deviceId, 'made-1');
  assert.equal(made.status, 'enabled');
  assert.equal(made.connectionState, 'Disconnected');
  assert.equal(made.authentication.type, 'sas');
  assert.equal(Buffer.from(made.authentication.symmetricKey.primaryKey, 'base64').length, 32);
  assert.ok(made.etag && made.generationId);

  const given = { deviceId: 'made-2', status: 'disabled', statusReason: 'not yet', authentication: { symmetricKey: { primaryKey, secondaryKey } } };
  assert.deepEqual((await body(registry.create(given))).authentication.symmetricKey, { primaryKey, secondaryKey });
  const twice = await refusal(registry.create({ deviceId: 'made-1' }));
  assert.deepEqual([twice.status, twice.name], [409, 'DeviceAlreadyExistsError']);
  assert.match(twice.body, /DeviceAlreadyExists/);
  assert.equal((await refusal(registry.create({ deviceId: 'bad id' }))).status, 400);

  assert.deepEqual(await body(registry.get('made-1')), made);
  const changed = await body(registry.update({ ...given, status: 'enabled' }));
  assert.equal(changed.status, 'enabled');
  assert.notEqual(changed.etag, (await body(registry.get('made-1'))).etag);

  const ids = (await body(registry.list())).map((device) => device.deviceId);
  for (const id of ['made-1', 'made-2', online]) assert.ok(ids.includes(id), `${id} in ${ids}`);
  const count = (await body(registry.getRegistryStatistics())).totalDeviceCount;
  assert.equal(count, ids.length);

  const { generationId } = await body(registry.get('made-2'));
  await registry.delete('made-2');
  for (const ask of ['get', 'getTwin', 'delete']) {
    const unknown = await refusal(registry[ask]('made-2'));
    assert.deepEqual([unknown.status, unknown.name, unknown.code], [404, 'DeviceNotFoundError', 'DeviceNotFound']);
  }
  assert.notEqual((await body(registry.create(given))).generationId, generationId);
}

async function modules() {
  const made = await body(registry.addModule({ deviceId: 'made-1', moduleId: 'part' }));
  assert.deepEqual([made.deviceId, made.moduleId], ['made-1', 'part']);
  assert.deepEqual((await body(registry.getModulesOnDevice('made-1'))).map((module) => module.moduleId), ['part']);
  const twin = await body(registry.getModuleTwin('made-1', 'part'));
  const changed = await body(registry.updateModuleTwin('made-1', 'part', { properties: { desired: { interval: 5 } } }, twin.etag));
  assert.equal(changed.properties.desired.interval, 5);
  assert.equal('interval' in (await twinOf('made-1')).properties.desired, false);
  await registry.removeModule('made-1', 'part');
  const gone = await refusal(registry.getModule('made-1', 'part'));
  assert.deepEqual([gone.status, gone.code], [404, 'ModuleNotFound']);
}

async function bulk() {
  const made = await body(registry.addDevices([{ deviceId: 'bulk-1' }, { deviceId: 'bulk-2' }]));
  assert.equal(made.isSuccessful, true);
  const again = await refusal(registry.addDevices([{ deviceId: 'bulk-2' }, { deviceId: 'bulk-3' }]));
  assert.equal(again.status, 400);
  const { isSuccessful, errors } = JSON.parse(again.body);
  assert.equal(isSuccessful, false);
  assert.deepEqual(errors.map((error) => error.deviceId), ['bulk-2']);
  const removed = await body(registry.removeDevices(['bulk-1', 'bulk-2', 'bulk-3'].map((deviceId) => ({ deviceId })), true));
  assert.equal(removed.isSuccessful, true);
}

async function twins() {
  const first = await twinOf('made-1');
  assert.deepEqual([first.properties.desired.$version, first.properties.reported.$version], [1, 1]);
  const patch = { tags: { site: 'north', floor: 2 }, properties: { desired: { interval: 30, firmware: { fwVersion: '2.8.5' } } } };
  const second = await body(registry.updateTwin('made-1', patch, first.etag));
  assert.notEqual(second.etag, first.etag);
  assert.equal(second.properties.desired.$version, 2);
  assert.equal(second.properties.desired.$metadata.firmware.fwVersion.$lastUpdatedVersion, 2);

  // A writer who read the twin before the last write is refused, and nothing is written.
  const stale = await refusal(registry.updateTwin('made-1', { tags: { site: 'south' } }, first.etag));
  assert.deepEqual([stale.status, stale.name, stale.code], [412, 'InvalidEtagError', 'PreconditionFailed']);
  assert.equal((await twinOf('made-1')).tags.site, 'north');
  assert.equal((await body(registry.updateTwin('made-1', { tags: { site: 'south' } }, '*'))).tags.site, 'south');

  // The Twin object keeps its ETag, and takes over the new one.
  const twin = await twinOf('made-1');
  await twin.update({ tags: { floor: null, room: 'a' } });
  await twin.update({ properties: { desired: { interval: 60 } } });
  const third = await twinOf('made-1');
  assert.deepEqual(third.tags, { site: 'south', room: 'a' });
  assert.equal(third.properties.desired.interval, 60);
  assert.equal(third.properties.desired.firmware.fwVersion, '2.8.5');
  await registry.updateTwin('made-1', { tags: { site: 'west' } }, '*');
  const old = await third.update({ tags: { site: 'east' } }).then(() => 'written', (error) => error.response.statusCode);
  assert.equal(old, 412);

  for (const wrong of [{ properties: { desired: { 'a.b': 1 } } }, { tags: { text: 'x'.repeat(9000) } }, { properties: { desired: 1 } }]) {
    assert.equal((await refusal(registry.updateTwin('made-1', wrong, '*'))).status, 400, JSON.stringify(wrong).slice(0, 80));
  }
  await registry.updateTwin('made-1', { properties: { desired: null } }, '*');
  const { $metadata, $version, ...left } = (await twinOf('made-1')).properties.desired;
  assert.deepEqual(left, {});
}

async function queries() {
  const ids = ['query-1', 'query-2', 'query-3', 'query-4', 'query-5'];
  for (const [index, deviceId] of ids.entries()) {
    await registry.create({ deviceId });
    await registry.updateTwin(deviceId, { tags: { rack: 'r1', place: index } }, '*');
  }
  const pages = async (text, size) => {
    const query = registry.createQuery(text, size);
    const found = [];
    while (query.hasMoreResults) found.push((await query.nextAsTwin()).result.map((twin) => twin.deviceId));
    return found;
  };
  const paged = await pages("SELECT * FROM devices WHERE tags.rack = 'r1'", 2);
  assert.deepEqual(paged.map((page) => page.length), [2, 2, 1]);
  assert.deepEqual(paged.flat().sort(), ids);
  assert.deepEqual((await pages("SELECT * FROM devices WHERE tags.rack = 'r1' AND tags.place >= 3")).flat().sort(), ids.slice(3));
  assert.deepEqual((await pages(`SELECT * FROM devices WHERE deviceId = '${online}' AND connectionState = 'Connected'`)).flat(), [online]);
  assert.deepEqual((await pages('SELECT * FROM devices WHERE IS_DEFINED(properties.reported.ready)')).flat(), [online]);
  const raw = (await registry.createQuery("SELECT deviceId, tags.place FROM devices WHERE deviceId IN ['query-2']").next()).result;
  assert.deepEqual(raw, [{ deviceId: 'query-2', place: 1 }]);
  const wrong = await refusal(registry.createQuery('SELECT * FROM devices WHERE tags.rack == 1').next());
  assert.equal(wrong.status, 400);
  assert.match(wrong.body, /column 40/);
}

async function methods() {
  const offline = await refusal(call('made-1', 'echo', {}));
  assert.deepEqual([offline.status, offline.code], [404, 'DeviceNotOnline']);
  assert.equal(JSON.parse(JSON.parse(offline.body).Message).errorCode, 404103);
  const unknown = await refusal(call('nobody', 'echo', {}));
  assert.deepEqual([unknown.status, unknown.code], [404, 'DeviceNotFound']);
  assert.match(unknown.body, /404001/);

  // The SDK's own limit is the sum of both times, so the hub's answer comes before it.
  const silent = await refusal(call(online, 'silent', null, { responseTimeoutInSeconds: 5, connectTimeoutInSeconds: 20 }));
  assert.deepEqual([silent.status, silent.name], [504, 'GatewayTimeoutError']);
  assert.equal(JSON.parse(JSON.parse(silent.body).Message).errorCode, 504101);
  for (const wrong of [{ responseTimeoutInSeconds: 4 }, { responseTimeoutInSeconds: 301 }, { connectTimeoutInSeconds: 301 }]) {
    assert.equal((await refusal(call(online, 'echo', null, wrong))).status, 400, JSON.stringify(wrong));
  }
  assert.equal((await refusal(call(online, 'echo', 'x'.repeat(200_000)))).status, 413);
  assert.equal((await call(online, 'echo', 'still here')).status, 200);
}

async function disabling() {
  const device = await body(registry.get(online));
  await registry.update({ ...device, status: 'disabled' });
  await until('the disabled device to be cut', async () => (await twinOf(online)).connectionState === 'Disconnected');
}

run(async () => {
  const [program, ...args] = process.argv.slice(2);
  start(program, args, await register());
  await until('the device to report', async () => (await twinOf(online)).properties.reported.ready);
  await step('registers, changes and deletes identities', identities);
  await step('registers modules', modules);
  await step('registers in bulk', bulk);
  await step('writes twins with ETags', twins);
  await step('queries in pages', queries);
  await step('is told why a method failed', methods);
  await step('cuts a disabled device', disabling);
});
