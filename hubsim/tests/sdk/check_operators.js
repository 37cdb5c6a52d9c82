// Runs the tutorials' operator programs against a device as the tutorials had it.
//
//   node check_operators.js PYTHON OPERATORS
//
// PYTHON is the Python to use, OPERATORS the folder of the programs; the environment is that of
// check_device.js.
'use strict';

const path = require('node:path');
const { assert, register, run, start, step, twinOf, until } = require('./hub.js');

const { DEVICE_ID, HUB_CA, HUB_SERVICE } = process.env;
const [python, operators] = process.argv.slice(2);

/** How the operator's program ended. */
function operate(program, script, uri, ...more) {
  const args = [path.join(operators, script), '--device', DEVICE_ID, '--uri', uri, '--limit', '60', ...more];
  return start(program, args, { IOTHUB_CONNECTION: HUB_SERVICE }).ended;
}

const status = async () => (await twinOf(DEVICE_ID)).properties.reported.iothubDM.firmwareUpdate.status;

run(async () => {
  start(process.execPath, [path.join(__dirname, 'tutorial_device.js')], await register());
  await until('the device to report', async () => (await twinOf(DEVICE_ID)).properties.reported.ready);
  await step("the Node operator's update", async () => {
    assert.equal(await operate(process.execPath, 'firmware_update.js', 'https://example.org/1.bin'), 0);
  });
  await step("the Python operator's update", async () => {
    assert.equal(await operate(python, 'firmware_update.py', 'https://example.org/2.bin', '--ca', HUB_CA), 0);
    assert.equal(await status(), 'applyComplete');
  });
  await step('an update that fails, with an object as payload', async () => {
    const uri = 'https://example.org/missing.bin';
    assert.equal(await operate(process.execPath, 'firmware_update.js', uri, '--payload', 'object'), 1);
    assert.equal(await status(), 'downloadfailed');
  });
});
