//! Firmware updates for embedded Linux devices on Azure IoT Hub.
