// A device as Microsoft's tutorials had it: reports what it pretends to do, by the contracts of the
// Node tutorial (reported.iothubDM.firmwareUpdate) and of the Python tutorial (reported.firmwareStatus)
// at once. A URI that holds "missing" fails to download. Environment as for device.js.
'use strict';

const fs = require('node:fs');
const { Client } = require('azure-iot-device');
const { Mqtt } = require('azure-iot-device-mqtt');

// Longer than the half second between two looks of an operator, so that each state is seen.
const PHASE_MS = 700;

async function main() {
  const client = Client.fromConnectionString(process.env.DEVICE_CONNECTION, Mqtt);
  await client.setOptions({ ca: fs.readFileSync(process.env.HUB_CA, 'ascii') });
  await client.open();
  const twin = await client.getTwin();
  const report = (patch) => new Promise((done, failed) => {
    twin.properties.reported.update(patch, (error) => (error ? failed(error) : done()));
  });
  const work = () => new Promise((done) => setTimeout(done, PHASE_MS));
  const now = () => new Date().toISOString();
  const phase = async (status, more, firmwareStatus) => {
    await report({ iothubDM: { firmwareUpdate: { status, ...more } }, ...(firmwareStatus && { firmwareStatus }) });
    await work();
  };

  async function update(fwPackageUri) {
    await phase('downloading', {}, 'downloading');
    if (fwPackageUri.includes('missing')) {
      await phase('downloadfailed', { error: { code: '404', message: 'not found' } });
      return;
    }
    await phase('downloadComplete', { downloadCompleteTime: now() });
    await phase('applying', { startedApplyingImage: now() }, 'applying');
    await phase('applyComplete', { lastFirmwareUpdate: now() }, 'completed');
  }

  client.onDeviceMethod('firmwareUpdate', async ({ payload }, response) => {
    let uri = payload?.fwPackageUri ?? payload;
    if (uri.startsWith('{')) uri = JSON.parse(uri).fwPackageUri;
    await report({
      iothubDM: { firmwareUpdate: { status: 'waiting', fwPackageUri: uri, error: null, startedWaitingTime: now() } },
      firmwareStatus: 'standBy',
    });
    await response.send(200, 'FirmwareUpdate started');
    await work();
    await update(uri);
  });
  await report({ iothubDM: { firmwareUpdate: { status: 'waiting' } }, firmwareStatus: 'standBy', ready: {} });
}

main().catch((error) => {
  console.error(error);
  process.exit(1);
});
