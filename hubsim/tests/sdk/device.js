// A device that does what the checks ask of it by methods, built on azure-iot-device.
//
// Its environment: HUB_CA (path), DEVICE_TRANSPORT (mqtt or websocket), and either
// DEVICE_CONNECTION (a connection string) or HUB_HOST, DEVICE_ID, DEVICE_CERT and DEVICE_KEY
// (paths). TOKEN_SECONDS is the life of its tokens, TOKEN_MARGIN how long before their end they are
// renewed. device.py is the same device.
'use strict';

const fs = require('node:fs');
const { Client, Message } = require('azure-iot-device');
const { Mqtt, MqttWs } = require('azure-iot-device-mqtt');

const env = process.env;
const pem = (name) => fs.readFileSync(env[name], 'ascii');

function makeClient() {
  const transport = env.DEVICE_TRANSPORT === 'websocket' ? MqttWs : Mqtt;
  const options = { ca: pem('HUB_CA') };
  if (!env.DEVICE_CONNECTION) {
    Object.assign(options, { cert: pem('DEVICE_CERT'), key: pem('DEVICE_KEY') });
  }
  if (env.TOKEN_SECONDS) {
    options.tokenRenewal = {
      tokenValidTimeInSeconds: Number(env.TOKEN_SECONDS),
      tokenRenewalMarginInSeconds: Number(env.TOKEN_MARGIN),
    };
  }
  const connection = env.DEVICE_CONNECTION
    ?? `HostName=${env.HUB_HOST};DeviceId=${env.DEVICE_ID};x509=true`;
  const client = Client.fromConnectionString(connection, transport);
  return client.setOptions(options).then(() => client);
}

function report(twin, patch) {
  return new Promise((done, failed) => {
    twin.properties.reported.update(patch, (error) => (error ? failed(error) : done()));
  });
}

async function main() {
  const client = await makeClient();
  client.on('error', (error) => console.log('client error', error.message));
  client.on('disconnect', (error) => console.log('disconnected', error?.message ?? ''));
  await client.open();
  const twin = await client.getTwin();
  let finished;
  const end = new Promise((done) => { finished = done; });

  const methods = {
    echo: async (payload) => [200, { echo: payload }],
    refuse: async () => [418, { why: 'asked to' }],
    silent: async () => null,
    readTwin: async () => {
      await twin.get();
      return [200, { desired: twin.properties.desired, reported: twin.properties.reported }];
    },
    report: async (payload) => {
      try {
        await report(twin, payload);
      } catch (error) {
        return [500, { error: `${error.name}: ${error.message}` }];
      }
      return [200, { ok: true }];
    },
    send: async (payload) => {
      const message = new Message(JSON.stringify(payload));
      message.contentType = 'application/json';
      message.contentEncoding = 'utf-8';
      message.properties.add('a key', 'a value / with signs & more');
      await client.sendEvent(message);
      return [200, { ok: true }];
    },
    quit: async () => [200, { ok: true }],
  };
  for (const [name, method] of Object.entries(methods)) {
    client.onDeviceMethod(name, async (request, response) => {
      console.log('method', name, JSON.stringify(request.payload)?.slice(0, 200));
      const answer = await method(request.payload);
      if (answer) await response.send(...answer);
      if (name === 'quit') finished();
    });
  }
  let known = twin.properties.desired.$version;
  twin.on('properties.desired', (patch) => {
    // The SDK also calls this with the whole document, each time that it reads the twin.
    if (patch.$version <= known) return;
    known = patch.$version;
    console.log('desired', JSON.stringify(patch));
    report(twin, { lastPatch: JSON.stringify(patch) })
      .catch((error) => console.log('report failed', error.message));
  });
  await report(twin, { ready: { desiredVersion: known } });
  await end;
  await client.close();
}

main().then(() => process.exit(0), (error) => {
  console.error(error);
  process.exit(1);
});
