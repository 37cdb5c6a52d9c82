//! A local Azure IoT Hub.
