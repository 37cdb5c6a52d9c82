// What the checks share: the hub under test as a service sees it, its log and its faults.
//
// The environment names the hub: HUB_SERVICE (connection string), HUB_HOST, HUB_CA (path),
// HUB_ADMIN (address of the admin endpoint), HUB_LOG (path of its JSON log).
'use strict';

const assert = require('node:assert/strict');
const fs = require('node:fs');
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

/** Events that the hub told about a device, oldest first. */
function events(device, kind) {
  const lines = fs.readFileSync(env.HUB_LOG, 'utf8').split('\n').slice(0, -1);
  const all = lines.filter((line) => line.startsWith('{')).map((line) => JSON.parse(line));
  return all.filter((event) => event.identity === device && event.event === kind);
}

/** Puts a fault in, by the admin endpoint. */
function fault(device, what) {
  const body = JSON.stringify(what);
  const url = `${env.HUB_ADMIN}/admin/devices/${encodeURIComponent(device)}/faults`;
  const headers = { 'Content-Type': 'application/json', 'Content-Length': Buffer.byteLength(body) };
  return new Promise((done, failed) => {
    const request = http.request(url, { method: 'POST', headers }, (response) => {
      let text = '';
      response.on('data', (part) => { text += part; });
      response.on('end', () => (response.statusCode < 300
        ? done() : failed(new Error(`fault: ${response.statusCode} ${text}`))));
    });
    request.on('error', failed);
    request.end(body);
  });
}

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
    console.log(error);
    process.exit(1);
  });
}

async function step(name, action) {
  console.log(`- ${name}`);
  return action();
}

module.exports = { assert, call, client, events, fault, refusal, registry, run, start, step, twinOf, until };
