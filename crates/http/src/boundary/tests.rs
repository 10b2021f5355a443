use proptest::prelude::*;

use super::*;

const OWN: Option<&str> = Some("acme_db");

fn json(text: &str) -> Result<(), Denied> {
    check_body(Carrier::JsonRpc, "/jsonrpc", Some("application/json"), text.as_bytes(), OWN).map(|_| ())
}

fn xml(text: &str) -> Result<(), Denied> {
    check_body(Carrier::XmlRpc, "/xmlrpc/2/object", Some("text/xml"), text.as_bytes(), OWN).map(|_| ())
}

fn call(arguments: &str) -> String {
    call_of("execute_kw", arguments)
}

fn call_of(method: &str, arguments: &str) -> String {
    format!(
        "<?xml version='1.0'?>\n<methodCall>\n<methodName>{method}</methodName>\n<params>\n{arguments}</params>\n</methodCall>\n"
    )
}

/// `reference` rule: `/jsonrpc` takes the database from the body, and no `dbfilter` is asked; `service=db` is denied.
#[test]
fn a_json_call_must_name_its_own_database_and_no_service_but_two() {
    let of = |service: &str, args: &str| {
        json(&format!(
            r#"{{"jsonrpc":"2.0","method":"call","params":{{"service":"{service}","method":"m","args":{args}}},"id":1}}"#
        ))
    };
    assert_eq!(of("object", r#"["acme_db",2,"x","res.partner","read",[[1]],{"a":[{}]}]"#), Ok(()));
    assert_eq!(of("common", "[]"), Ok(()));
    assert_eq!(of("object", r#"["acme\u005fdb",2]"#), Ok(()));
    assert_eq!(of("object", r#"["bolt_db",2,"x"]"#), Err(Denied::Database));
    assert_eq!(of("object", r#"["acme_db ",2,"x"]"#), Err(Denied::Database));
    assert_eq!(of("common", "[true]"), Err(Denied::Database));
    assert_eq!(of("db", "[]"), Err(Denied::Service));
    assert_eq!(of("d\\u0062", "[]"), Err(Denied::Service));
    for bad in [
        // The second of two keys counts for Python.
        r#"{"params":{"service":"object","args":["acme_db"],"args":["bolt_db"]}}"#,
        r#"{"params":{"service":"object","args":["acme_db"],"\u0061rgs":["bolt_db"]}}"#,
        r#"{"params":{"service":"common","service":"db","args":[]}}"#,
        r#"{"params":{"service":"object","args":["acme_db"]},"params":{"service":"object","args":["bolt_db"]}}"#,
        r#"{"params":{"service":"object","args":"a"}}"#,
        r#"{"params":{"service":"object","args":[["bolt_db"]]}}"#,
        r#"{"params":{"service":"object"}}"#,
        r#"{"params":{"service":"object","args":["acme_db"]}} {"params":{}}"#,
        "{\"params\":{\"service\":\"object\",\"args\":[\"acme_db\"]}}\u{feff}",
        "\u{feff}{\"params\":{\"service\":\"object\",\"args\":[\"acme_db\"]}}",
        "",
        "service=object&args=bolt_db",
    ] {
        assert!(matches!(json(bad), Err(Denied::Unreadable(_))), "{bad}: {:?}", json(bad));
    }
    let utf16 = Some("application/json; charset=utf-16");
    let refused = check_body(Carrier::JsonRpc, "/jsonrpc", utf16, &b"{}"[..], OWN);
    assert!(matches!(refused, Err(Denied::Unreadable(_))));
    assert_eq!(
        check_body(Carrier::JsonRpc, "/jsonrpc", None, &br#"{"params":{"service":"object","args":["a"]}}"#[..], None),
        Err(Denied::Database)
    );
}

/// `reference` rule: `/xmlrpc/2/common` takes the database from the body too.
#[test]
fn an_xml_call_must_name_its_own_database_first_and_in_the_plain_form() {
    for good in [
        call("<param>\n<value><string>acme_db</string></value>\n</param>\n<param><value><int>2</int></value></param>"),
        call("<param><value>acme_db</value></param>"),
        call("<param><value>\n  <string>acme_db</string>\n</value></param>"),
        call(""),
        "<methodCall><methodName>version</methodName><params/></methodCall>".to_owned(),
        "<methodCall><methodName>version</methodName></methodCall>".to_owned(),
        call("<param><value>acme_db</value></param>").replace("'1.0'", "'1.0' encoding='iso-8859-1'"),
    ] {
        assert_eq!(xml(&good), Ok(()), "{good}");
    }
    for foreign in [
        call("<param><value><string>bolt_db</string></value></param>"),
        call("<param><value>bolt_db</value></param>"),
        call("<param><value><string> acme_db</string></value></param>"),
        call("<param><value><int>1</int></value></param><param><value>acme_db</value></param>"),
        call("<param><value></value></param>"),
    ] {
        assert_eq!(xml(&foreign), Err(Denied::Database), "{foreign}");
    }
    let own = "<param><value>acme_db</value></param>";
    for odd in [
        // A value that stands anywhere before becomes the first argument.
        call(own).replace("<methodName>", "<value>bolt_db</value><methodName>"),
        call(own).replace("execute_kw", "<value>bolt_db</value>"),
        call(own).replace("<params>", "<value>bolt_db</value><params>"),
        call(&own.replace("<value>", "<value><value>bolt_db</value>")),
        call(&own.replace("acme_db", "acme_db<string>bolt_db</string>")),
        call(&own.replace("acme_db", "bolt<!-- -->acme_db")),
        call(&own.replace("acme_db", "<![CDATA[bolt_db]]>")),
        call(&own.replace("acme_db", "acme&#95;db")),
        call(&own.replace("acme_db", "ac<?x?>me_db")),
        call(&own.replace("value>", "x:value>")),
        call(own).replace("<methodCall>", "<!DOCTYPE x [<!ENTITY e 'bolt_db'>]><methodCall>"),
        call(own).replace("<params>", "<params a='1'>"),
        call(own).replace("'1.0'", "'1.0' encoding='utf-16'"),
        call(own).replace("'1.0'", "'1.0' encoding='cp037'"),
        format!("{}<params><param><value>bolt_db</value></param></params>", call("").replace("</methodCall>\n", "")),
        format!("{} {}", call(""), call(own)),
        format!("<methodCall><methodName>{}</methodName>", "a".repeat(100_000)),
        "\u{feff}<methodCall><methodName>version</methodName></methodCall>".to_owned(),
        String::new(),
    ] {
        assert!(xml(&odd).is_err(), "{odd}");
    }
    for path in ["/xmlrpc/db", "/xmlrpc/2/db", "/xmlrpc/2", "/xmlrpc", "/xmlrpc/2/object/x", "/fr/xmlrpc/2/db"] {
        assert_eq!(carrier(path), Err(Denied::Service), "{path}");
    }
}

#[test]
fn a_login_and_a_form_must_name_their_own_database_or_none() {
    let login =
        |text: &str| check_body(Carrier::Login, "/web/session/authenticate", None, text.as_bytes(), OWN).map(|_| ());
    assert_eq!(login(r#"{"params":{"db":"acme_db","login":"a","password":"b"}}"#), Ok(()));
    assert_eq!(login(r#"{"params":{"login":"a"}}"#), Ok(()));
    assert_eq!(login(r#"{"params":{"db":"bolt_db","login":"a"}}"#), Err(Denied::Database));
    assert!(login(r#"{"params":{"db":"acme_db","db":"bolt_db"}}"#).is_err());
    assert!(login(r#"{"params":{"db":["bolt_db"]}}"#).is_err());

    let form =
        |kind: &str, text: &str| check_body(Carrier::Form, "/web/login", Some(kind), text.as_bytes(), OWN).map(|_| ());
    let urlencoded = "application/x-www-form-urlencoded";
    assert_eq!(form(urlencoded, "login=a&db=acme_db&password=b"), Ok(()));
    assert_eq!(form(urlencoded, "login=a&db=&password=b"), Ok(()));
    assert_eq!(form(urlencoded, "db=acme_db&db=bolt_db"), Err(Denied::Database));
    assert_eq!(form("Application/X-WWW-Form-URLencoded; charset=utf-8", "d%62=bolt%5fdb"), Err(Denied::Database));
    for more in [
        "multipart/form-data; boundary=x",
        "application/x-url-encoded",
        "application/x-www-form-urlencoded, x",
        "application/x-www-form-urlencoded x",
        "application/x-www-form-urlencoded\u{a0}",
        "application/xml",
    ] {
        assert_eq!(form(more, "db=bolt_db"), Err(Denied::MediaType), "{more}");
    }
    assert!(form(urlencoded, "login=a&password=x&login=b").is_err());
    assert_eq!(form("application/json", "{}"), Ok(()));
}

#[test]
fn a_query_names_its_own_database_or_none_and_no_session() {
    let query = |text: &str| check_query("/web", text.as_bytes(), OWN);
    for good in ["", "db=acme_db", "db", "db=", "debug=1&id=3", "session_id=short", "state=x"] {
        assert_eq!(query(good), Ok(()), "{good}");
    }
    for bad in
        ["db=bolt_db", "x=1&db=bolt_db", "%64b=bolt_db", "%64%62=bolt_db", "db=acme_db&db=bolt_db", "db=acme_db+"]
    {
        assert_eq!(query(bad), Err(Denied::Database), "{bad}");
    }
    for session in ["a1".repeat(20), "Zz-_".repeat(21), format!("{}%0A", "a1".repeat(20))] {
        assert_eq!(query(&format!("session_id={session}")), Err(Denied::Session), "{session}");
    }
    let state = |d: &str| check_query("/auth_oauth/signin", format!("state=%7B%22d%22%3A%22{d}%22%7D").as_bytes(), OWN);
    assert_eq!((state("acme_db"), state("bolt_db")), (Ok(()), Err(Denied::Database)));
    let relay =
        |d: &str| check_query("/auth_saml/signin", format!("RelayState=%7B%22d%22%3A%22{d}%22%7D").as_bytes(), OWN);
    assert_eq!((relay("acme_db"), relay("bolt_db")), (Ok(()), Err(Denied::Database)));
}

#[test]
fn every_path_that_can_name_a_database_is_known_in_every_spelling() {
    for (path, expected) in [
        ("/jsonrpc", Carrier::JsonRpc),
        ("/fr/jsonrpc", Carrier::JsonRpc),
        ("/pt_BR/web/login", Carrier::Form),
        ("/xmlrpc/2/object", Carrier::XmlRpc),
        ("/fr/xmlrpc/common", Carrier::XmlRpc),
        ("/web/session/authenticate", Carrier::Login),
        ("/web", Carrier::Form),
        ("/odoo/sales/1", Carrier::Form),
        ("/web/dataset/call_kw/res.partner/read", Carrier::Other),
        ("/jsonrpcx", Carrier::Other),
        ("/english/web/login", Carrier::Form),
        ("/E/jsonrpc", Carrier::JsonRpc),
        ("/", Carrier::Other),
    ] {
        assert_eq!(carrier(path), Ok(expected), "{path}");
    }
}

/// The rule "`/web/login`, `/web/session/authenticate`, … limit per address and login".
#[test]
fn who_tries_to_log_in_is_known_by_every_way_and_the_answer_says_whether_it_was_right() {
    let tried = |carrier, path: &str, text: &str| {
        let kind = Some("application/x-www-form-urlencoded").filter(|_| carrier == Carrier::Form);
        check_body(carrier, path, kind, text.as_bytes(), OWN).unwrap().map(|attempt| attempt.login)
    };
    let by = |login: &str| Some(login.to_owned());
    assert_eq!(tried(Carrier::Form, "/web/login", "login=a%40b&password=x&csrf_token=y"), by("a@b"));
    assert_eq!(tried(Carrier::Form, "/fr/web/login", "login=a&password=x"), by("a"));
    assert_eq!(tried(Carrier::Form, "/web/login/totp", "totp_token=1&login=x"), by(" second factor"));
    assert_eq!(tried(Carrier::Form, "/odoo", "login=a"), None);
    assert_eq!(
        tried(Carrier::Login, "/web/session/authenticate", r#"{"params":{"login":"a","password":"b"}}"#),
        by("a")
    );
    let call = |service, method| {
        format!(r#"{{"params":{{"service":"{service}","method":"{method}","args":["acme_db","a","x",{{}}]}}}}"#)
    };
    assert_eq!(tried(Carrier::JsonRpc, "/jsonrpc", &call("common", "authenticate")), by("a"));
    assert_eq!(tried(Carrier::JsonRpc, "/jsonrpc", &call("common", "login")), by("a"));
    assert_eq!(tried(Carrier::JsonRpc, "/jsonrpc", &call("object", "execute_kw")), by("a"));
    assert_eq!(
        tried(Carrier::JsonRpc, "/jsonrpc", r#"{"params":{"service":"common","method":"version","args":[]}}"#),
        None
    );
    let two = "<param><value>acme_db</value></param><param><value><string>a</string></value></param>";
    let xml = call_of("authenticate", two);
    assert_eq!(tried(Carrier::XmlRpc, "/xmlrpc/2/common", &xml), by("a"));
    assert_eq!(tried(Carrier::XmlRpc, "/xmlrpc/2/common", &call_of("version", two)), by("a"));
    let odd = two.replace(">a<", ">a<!-- --><");
    assert_eq!(tried(Carrier::XmlRpc, "/xmlrpc/2/common", &call_of("authenticate", &odd)), by(""));
    assert_eq!(tried(Carrier::XmlRpc, "/xmlrpc/2/common", &call_of("version", "")), None);

    for (told_by, status, location, body, expected) in [
        (ToldBy::Redirect, 303, "/odoo", "", Some(true)),
        (ToldBy::Redirect, 303, "/web/login/totp", "", Some(true)),
        (ToldBy::Redirect, 303, "/web/login?redirect=x", "", None),
        (ToldBy::Redirect, 200, "", "Wrong login/password", Some(false)),
        (ToldBy::Redirect, 400, "", "Session expired (invalid CSRF token)", None),
        (ToldBy::Redirect, 503, "", "", None),
        (ToldBy::Nothing, 200, "", "", None),
        (ToldBy::Json, 200, "", r#"{"result":{"uid":2,"db":"acme_db"}}"#, Some(true)),
        (ToldBy::Json, 200, "", r#"{"result":{"uid":null}}"#, Some(false)),
        (ToldBy::Json, 200, "", r#"{"result":7}"#, Some(true)),
        (ToldBy::Json, 200, "", r#"{"result":false}"#, Some(false)),
        (ToldBy::Json, 200, "", r#"{"error":{"code":200}}"#, Some(false)),
        (ToldBy::Json, 200, "", "<html>", None),
        (ToldBy::Xml, 200, "", "<methodResponse><value><int>2</int></value>", Some(true)),
        (ToldBy::Xml, 200, "", "<methodResponse><value><boolean>0</boolean></value>", Some(false)),
        (ToldBy::Xml, 200, "", "<methodResponse><fault><value/></fault>", Some(false)),
        (ToldBy::Xml, 400, "", "bad request", None),
        (ToldBy::Xml, 200, "", "<html>", None),
        (ToldBy::Refusal, 200, "", r#"{"error":{"data":{"name":"odoo.exceptions.AccessDenied"}}}"#, Some(false)),
        (ToldBy::Refusal, 200, "", r#"{"error":{"data":{"name":"odoo.exceptions.UserError"}}}"#, Some(true)),
    ] {
        let location = Some(location).filter(|l| !l.is_empty());
        assert_eq!(told_by.verdict(status, location, body.as_bytes()), expected, "{told_by:?} {status} {body}");
    }
}

/// A tenant may give the routes other names: a call is known by its form.
#[test]
fn a_remote_call_is_known_on_any_route() {
    let other =
        |kind: &str, text: &str| check_body(Carrier::Other, "/shop/x", Some(kind), text.as_bytes(), OWN).map(|_| ());
    let json = |text: &str| other("application/json", text);
    for good in [
        r#"{"jsonrpc":"2.0","params":{"model":"res.partner","method":"read","args":[[1]],"kwargs":{}}}"#,
        r#"{"params":{"service":"object","args":["acme_db",2]}}"#,
        r#"{"params":{"service":"delivery","args":["bolt_db"]}}"#,
        r#"{"params":{"db":"acme_db"}}"#,
        r#"{"event":{"params":{"db":"bolt_db"}}}"#,
        r#"{"params":"db"}"#,
        "[1,2]",
    ] {
        assert_eq!(json(good), Ok(()), "{good}");
    }
    for bad in [
        r#"{"params":{"service":"object","args":["bolt_db",2]}}"#,
        r#"{"params":{"args":["bolt_db",2],"service":"common"}}"#,
        r#"{"params":{"service":"object","args":["acme_db"],"args":["bolt_db"]}}"#,
        r#"{"params":{"service":"object","args":["bolt_db"]},"params":{}}"#,
        r#"{"params":{"\u0064b":"bolt_db"}}"#,
        r#"{"params":{"service":"db","args":[]}}"#,
        r#"{"params":{"service":"object","args":["acme_db",NaN]}}"#,
    ] {
        assert!(json(bad).is_err(), "{bad}");
    }
    let call = |name: &str| call(&format!("<param><value>{name}</value></param>"));
    assert_eq!(other("text/xml", &call("acme_db")), Ok(()));
    assert_eq!(other("text/plain", &call("bolt_db")), Err(Denied::Database));
    let wide: Vec<u8> = call("bolt_db").bytes().flat_map(|b| [b, 0]).collect();
    assert!(check_body(Carrier::Other, "/x", None, &wide[..], OWN).is_err());
    assert_eq!(other("image/png", "\u{89}PNG"), Ok(()));
}

proptest! {
    /// A call that is let through, read as Python reads it, has the tenant's database for its first argument.
    #[test]
    fn no_arrangement_of_tags_hides_another_database(parts in prop::collection::vec(prop::sample::select(vec![
        "<methodCall>", "</methodCall>", "<methodName>", "</methodName>", "<params>", "</params>", "<params/>", "<param>",
        "</param>", "<value>", "</value>", "<string>", "</string>", "acme_db", "bolt_db", " ", "<array>", "</array>",
        "<data>", "</data>", "<int>", "</int>", "<!-- -->", "<![CDATA[bolt_db]]>", "version", "<value/>", "<nil/>",
    ]), 0..24)) {
        let text = parts.concat();
        if xml(&text).is_ok() {
            prop_assert!(values(&text).first().is_none_or(|first| first == "acme_db"), "{}", text);
        }
    }

    #[test]
    fn nothing_makes_the_readers_panic(bytes in prop::collection::vec(any::<u8>(), 0..200), path in "[/a-z2%]{0,20}") {
        for carrier in [Carrier::JsonRpc, Carrier::XmlRpc, Carrier::Login, Carrier::Form] {
            let _ = check_body(carrier, &path, Some("application/x-www-form-urlencoded"), &bytes[..], OWN);
            let _ = check_body(carrier, "/xmlrpc/common", None, &bytes[..], OWN);
        }
        let _ = check_query(&path, &bytes, OWN);
    }
}

/// The arguments as `xmlrpc.client.Unmarshaller` finds them: a model of it, for flat documents.
fn values(text: &str) -> Vec<String> {
    let (mut found, mut data, mut in_value) = (Vec::new(), String::new(), false);
    for event in std::iter::from_fn({
        let mut rest = text;
        move || {
            let (piece, after) = if let Some(cdata) = rest.strip_prefix("<![CDATA[") {
                let end = cdata.find("]]>")?;
                (format!("={}", &cdata[..end]), &cdata[end + 3..])
            } else if rest.starts_with('<') {
                let end = rest.find('>')? + 1;
                (rest[..end].to_owned(), &rest[end..])
            } else if rest.is_empty() {
                return None;
            } else {
                let end = rest.find('<').unwrap_or(rest.len());
                (format!("={}", &rest[..end]), &rest[end..])
            };
            rest = after;
            Some(piece)
        }
    }) {
        match event.as_str() {
            "</string>" | "</int>" | "<nil/>" => {
                found.push(std::mem::take(&mut data));
                in_value = false;
            }
            "</value>" | "<value/>" => {
                if in_value || event == "<value/>" {
                    found.push(data.clone());
                }
                in_value = false;
            }
            tag if tag.starts_with("</") || tag.starts_with("<!") => {}
            tag if tag.starts_with('<') => {
                data.clear();
                in_value = tag == "<value>";
            }
            piece => data.push_str(&piece[1..]),
        }
    }
    found
}
