//! What the cloud says, as values: payloads of direct methods and the desired section `firmware`.
//! No I/O, and nothing gets past here that could not be carried out.

mod desired;
mod job;
mod method;

pub use desired::{desired, fingerprint};
pub use method::{METHODS, STATUS, command};

/// Which images may be asked for from the cloud.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub struct Rules {
    /// Take `http` URLs too, if the same request carries a digest.
    pub allow_http: bool,
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use serde_json::{Value, json};

    use super::desired::tests::section;
    use super::method::tests::install;
    use super::*;

    const STRICT: Rules = Rules { allow_http: false };
    const LAX: Rules = Rules { allow_http: true };

    #[test]
    fn takes_http_only_by_the_rules() {
        let bare = json!({"fwPackageUri": "http://h/fw"});
        let checked =
            json!({"fwPackageUri": "http://h/fw", "fwPackageCheckValue": "ab".repeat(32)});
        for (payload, rules, taken) in [
            (&bare, STRICT, false),
            (&checked, STRICT, false),
            (&bare, LAX, false),
            (&checked, LAX, true),
        ] {
            assert_eq!(install(&payload.to_string(), rules).is_ok(), taken, "{payload} {rules:?}");
            assert_eq!(
                section(payload.clone(), rules).unwrap().is_ok(),
                taken,
                "{payload} {rules:?}"
            );
        }
    }

    proptest! {
        #[test]
        fn all_encodings_mean_the_same(
            path in "[a-zA-Z0-9/_.-]{0,40}",
            version in proptest::option::of("[0-9a-z.]{1,20}"),
            size in proptest::option::of(1_u64..1 << 50),
        ) {
            let mut object = json!({"fwPackageUri": format!("https://h/{path}")});
            version.iter().for_each(|version| object["fwVersion"] = json!(version));
            size.iter().for_each(|size| object["fwSize"] = json!(size));
            let plain = object.to_string();
            let in_string = Value::from(plain.as_str()).to_string();
            let members: Vec<String> = object
                .as_object()
                .unwrap()
                .iter()
                .map(|(key, value)| format!("{key} : {}", value.to_string().replace('"', "'")))
                .collect();
            let lenient = format!("{{ {} }}", members.join(", "));
            let job = install(&plain, STRICT).unwrap();
            prop_assert_eq!(&install(&in_string, STRICT).unwrap(), &job);
            prop_assert_eq!(&install(&lenient, STRICT).unwrap(), &job);
            prop_assert_eq!(&section(object, STRICT).unwrap().unwrap(), &job);
        }
    }
}
