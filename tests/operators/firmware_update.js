// An operator's program as Microsoft's Node tutorial had it: calls the method firmwareUpdate and
// reads reported.iothubDM.firmwareUpdate every 500 ms. As the original does, it crashes if that is
// not there, and it hands the payload over as a string that holds JSON.
//
//   IOTHUB_CONNECTION='HostName=...' node firmware_update.js --device ID --uri URI
//
// NODE_EXTRA_CA_CERTS names the hub's CA, NODE_PATH the folder with azure-iothub. --version and
// --check add fwVersion and fwPackageCheckValue; --payload object sends the payload as an object.
// Prints each new state as a line of JSON; ends with 0 after applyComplete, 1 after a failed state,
// 2 if the method was refused, 3 when the time (--limit, seconds) is over.
'use strict';

const { parseArgs } = require('node:util');
const { Client, Registry } = require('azure-iothub');

const { values: args } = parseArgs({
  options: {
    device: { type: 'string' },
    uri: { type: 'string' },
    version: { type: 'string' },
    check: { type: 'string' },
    payload: { type: 'string', default: 'string' },
    limit: { type: 'string', default: '600' },
  },
});

const connection = process.env.IOTHUB_CONNECTION;
if (!connection || !args.device || !args.uri) {
  console.error('needs IOTHUB_CONNECTION in the environment, --device and --uri');
  process.exit(64);
}
const registry = Registry.fromConnectionString(connection);
const client = Client.fromConnectionString(connection);

function startFirmwareUpdate() {
  const update = {
    fwPackageUri: args.uri,
    ...(args.version && { fwVersion: args.version }),
    ...(args.check && { fwPackageCheckValue: args.check }),
  };
  const parameters = {
    methodName: 'firmwareUpdate',
    payload: args.payload === 'object' ? update : JSON.stringify(update),
    timeoutInSeconds: 30, // As printed in the tutorial; the hub does not know this member.
  };
  client.invokeDeviceMethod(args.device, parameters, (error, answer) => {
    if (error) {
      console.error(`firmwareUpdate failed: ${error.message} ${error.responseBody ?? ''}`);
      process.exit(2);
    }
    console.log(JSON.stringify({ answer }));
    if (answer.status >= 300) process.exit(2);
  });
}

let last;
function queryTwin() {
  registry.getTwin(args.device, (error, twin) => {
    if (error) {
      console.error(`the twin could not be read: ${error.message}`);
      return;
    }
    const state = twin.properties.reported.iothubDM.firmwareUpdate;
    const text = JSON.stringify(state.status);
    if (text !== last) console.log(JSON.stringify(state));
    last = text;
    if (state.status === 'applyComplete') process.exit(0);
    if (/failed$/i.test(state.status)) process.exit(1);
  });
}

startFirmwareUpdate();
setInterval(queryTwin, 500);
setTimeout(() => {
  console.error(`no end within ${args.limit} s`);
  process.exit(3);
}, Number(args.limit) * 1000);
