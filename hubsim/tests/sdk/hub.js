// What the checks share: the hub under test as a service sees it, its events and its faults.
//
// The environment names the hub: HUB_SERVICE (connection string), HUB_HOST, HUB_CA (path), HUB_ADMIN
// (address of the admin endpoint). DEVICE_ID is the device to be made, DEVICE_CREDENTIAL says what
// it shows: token, shortToken (renewed after seconds) or certificate (DEVICE_CERT and DEVICE_KEY are
// its files, DEVICE_THUMBPRINT its SHA-256 in hex).
'use strict';

const assert = require('node:assert/strict');
const http = require('node:http');
const { spawn } = require('node:child_process');
const { Client, Registry } = require('azure-iothub');

const env = process.env;
const WAIT_MS = 30_000;
const registry = Registry.fromConnectionString(env.HUB_SERVICE);
const client = Client.fromConnectionString(env.HUB_SERVICE);

/** Asks until `look` gives something; fails with `what` after half a minute. */
async function until(what, look) {
  const end = Date.now() + WAIT_MS;
  let last;
  for (;;) {
    last = await look();
    if (last) return last;
    if (Date.now() > end) throw new Error(`waited ${WAIT_MS / 1000} s for ${what}`);
    await new Promise((done) => setTimeout(done, 50));
  }
}

/** Registers the device that the environment describes; gives what its program needs to know. */
async function register() {
  const deviceId = env.DEVICE_ID;
  if (env.DEVICE_CREDENTIAL === 'certificate') {
    const x509Thumbprint = { primaryThumbprint: env.DEVICE_THUMBPRINT };
    await registry.create({ deviceId, authentication: { type: 'selfSigned', x509Thumbprint } });
    // Certificates are asked for differently in TLS 1.2 and 1.3.
    return env.DEVICE_TRANSPORT === 'mqtt' ? { NODE_OPTIONS: '--tls-max-v1.2' } : {};
  }
  const { primaryKey, secondaryKey } = (await registry.create({ deviceId })).responseBody.authentication.symmetricKey;
  // Both keys must do, and a gateway name must not be taken for the hub's.
  const [key, gateway] = env.DEVICE_TRANSPORT === 'websocket'
    ? [secondaryKey, ';GatewayHostName=localhost'] : [primaryKey, ''];
  const settings = { DEVICE_CONNECTION: `HostName=${env.HUB_HOST};DeviceId=${deviceId};SharedAccessKey=${key}${gateway}` };
  // The Python SDK renews 120 s before the end, whatever the life of the token.
  return env.DEVICE_CREDENTIAL === 'shortToken'
    ? { ...settings, TOKEN_SECONDS: '123', TOKEN_MARGIN: '120' } : settings;
}

/** Asks the admin endpoint; gives the answer's JSON, if it has any. */
function admin(method, path, body) {
  const text = body === undefined ? '' : JSON.stringify(body);
  const headers = { 'Content-Type': 'application/json', 'Content-Length': Buffer.byteLength(text) };
  return new Promise((done, failed) => {
    const request = http.request(env.HUB_ADMIN + path, { method, headers }, (response) => {
      let answer = '';
      response.on('data', (part) => { answer += part; });
      response.on('end', () => (response.statusCode < 300
        ? done(answer && JSON.parse(answer))
        : failed(new Error(`${method} ${path}: ${response.statusCode} ${answer}`))));
    });
    request.on('error', failed);
    request.end(text);
  });
}

/** What has happened to a device, oldest first. */
const events = async (device, kind) => (await admin('GET', '/events'))
  .filter((event) => event.identity === device && event.event === kind);

/** Puts a fault in. */
const fault = (device, what) => admin('POST', `/devices/${encodeURIComponent(device)}/faults`, what);

/** A method's answer, as `{status, payload}`. */
async function call(device, methodName, payload, timeouts = {}) {
  const parameters = { methodName, payload, responseTimeoutInSeconds: 30, ...timeouts };
  return (await client.invokeDeviceMethod(device, parameters)).result;
}

/** The error that a promise ends in, as `{status, name, body}`. */
async function refusal(promise) {
  const error = await promise.then(
    (value) => { throw new Error(`expected a refusal, got ${JSON.stringify(value)}`); },
    (error) => error,
  );
  if (!error.response) throw error;
  return {
    status: error.response.statusCode,
    name: error.constructor.name,
    code: error.response.headers['iothub-errorcode'],
    body: error.responseBody,
  };
}

const twinOf = async (device) => (await registry.getTwin(device)).responseBody;

/** Starts a program whose output goes to ours, and tells of its end. */
function start(program, args, settings) {
  const child = spawn(program, args, { env: { ...env, ...settings }, stdio: ['ignore', 'inherit', 'inherit'] });
  const ended = new Promise((done) => {
    child.on('error', (error) => done(`${program}: ${error.message}`));
    child.on('exit', (code, signal) => done(code ?? signal));
  });
  return { child, ended };
}

/** Runs a check to its end; its steps are printed, and a failure ends the program with 1. */
function run(check) {
  check().then(() => { console.log('all steps passed'); process.exit(0); }, (error) => {
    // The SDK's errors carry the whole connection; a person wants the answer.
    console.log(error.response ? `${error.stack}\n${error.responseBody}` : error);
    process.exit(1);
  });
}

async function step(name, action) {
  console.log(`- ${name}`);
  return action();
}

module.exports = { assert, call, client, events, fault, refusal, register, registry, run, start, step, twinOf, until };
