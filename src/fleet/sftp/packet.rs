//! The packets of SFTP, version 3, as in draft-ietf-secsh-filexfer-02 and, for what begins with
//! `EXTENDED`, in OpenSSH's PROTOCOL: requests to be sent, and answers as they are understood.
//!
//! An answer may be anything; nothing in it is read beyond its end.

/// How much of a file one packet carries: as much as every server takes.
pub const CHUNK: u16 = 32 * 1024;

const INIT: u8 = 1;
const VERSION: u8 = 2;
const OPEN: u8 = 3;
const CLOSE: u8 = 4;
const READ: u8 = 5;
const WRITE: u8 = 6;
const FSTAT: u8 = 8;
const OPENDIR: u8 = 11;
const READDIR: u8 = 12;
const REMOVE: u8 = 13;
const STATUS: u8 = 101;
const HANDLE: u8 = 102;
const DATA: u8 = 103;
const NAME: u8 = 104;
const ATTRS: u8 = 105;
const EXTENDED: u8 = 200;

/// How a file is opened.
const FOR_READING: u32 = 1;
/// To write it, made if it is not there, and emptied if it is.
const FOR_WRITING: u32 = 2 | 8 | 16;

/// What attributes there are.
const HAS_SIZE: u32 = 1;
const HAS_OWNER: u32 = 2;
const HAS_MODE: u32 = 4;
const HAS_TIMES: u32 = 8;

/// How a request ended.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Code(pub u32);

impl Code {
    pub const OK: Self = Self(0);
    /// The end of a file, or of a directory.
    pub const END: Self = Self(1);
    pub const NOT_FOUND: Self = Self(2);
    /// All that this version says of anything else, such as a name that is taken.
    pub const FAILURE: Self = Self(4);

    /// What is said of anything else that may come instead of an answer.
    pub const UNEXPECTED: &str = "the answer is not valid SFTP";

    /// What it says, in OpenSSH's words.
    pub fn text(self) -> &'static str {
        match self.0 {
            1 => "End of file",
            2 => "No such file",
            3 => "Permission denied",
            4 => "Failure",
            8 => "Operation unsupported",
            _ => Self::UNEXPECTED,
        }
    }
}

/// What a server answers.
#[derive(Debug, PartialEq)]
pub enum Reply {
    Code(Code),
    Handle(Vec<u8>),
    Data(Vec<u8>),
    /// Names in a directory; those that are no UTF-8 are left out.
    Names(Vec<String>),
    /// When a file was modified, in seconds since 1970; 0 if that is not said.
    Modified(u32),
}

impl Reply {
    /// The answer in a packet without its length, and the number of the request; `None` if there is none in it.
    pub fn parse(packet: &[u8]) -> Option<(u32, Self)> {
        let (kind, mut fields) = (packet.first()?, Fields(packet.get(1..)?));
        let number = fields.number()?;
        let answer = match *kind {
            STATUS => Self::Code(Code(fields.number()?)),
            HANDLE => Self::Handle(fields.text()?.to_vec()),
            DATA => Self::Data(fields.text()?.to_vec()),
            NAME => {
                let mut names = Vec::new();
                for _ in 0..fields.number()? {
                    let name = fields.text()?;
                    fields.text()?;
                    fields.attributes()?;
                    names.extend(String::from_utf8(name.to_vec()));
                }
                Self::Names(names)
            }
            ATTRS => Self::Modified(fields.attributes()?),
            _ => return None,
        };
        Some((number, answer))
    }
}

/// What is left of a packet.
struct Fields<'a>(&'a [u8]);

impl<'a> Fields<'a> {
    fn take(&mut self, count: usize) -> Option<&'a [u8]> {
        let (taken, rest) = self.0.split_at_checked(count)?;
        self.0 = rest;
        Some(taken)
    }

    fn number(&mut self) -> Option<u32> {
        Some(u32::from_be_bytes(self.take(4)?.try_into().ok()?))
    }

    fn text(&mut self) -> Option<&'a [u8]> {
        let length = self.number()?;
        self.take(length as usize)
    }

    /// Passes over attributes; returns when the file was modified.
    fn attributes(&mut self) -> Option<u32> {
        let has = self.number()?;
        for (what, size) in [(HAS_SIZE, 8), (HAS_OWNER, 8), (HAS_MODE, 4)] {
            self.take(if has & what == 0 { 0 } else { size })?;
        }
        if has & HAS_TIMES == 0 {
            return Some(0);
        }
        self.number()?;
        self.number()
    }
}

/// What a client says first.
pub fn hello() -> Vec<u8> {
    Packet { kind: INIT, fields: Vec::new() }.bytes(3)
}

/// Whether a packet without its length is what a server answers to that.
pub fn is_hello(packet: &[u8]) -> bool {
    packet.starts_with(&[VERSION, 0, 0, 0, 3])
}

/// What is sent: a request.
pub struct Packet {
    kind: u8,
    fields: Vec<u8>,
}

impl Packet {
    fn new(kind: u8, texts: &[&[u8]]) -> Self {
        texts.iter().fold(Self { kind, fields: Vec::new() }, |packet, text| packet.text(text))
    }

    fn number(mut self, number: u32) -> Self {
        self.fields.extend(number.to_be_bytes());
        self
    }

    fn offset(mut self, offset: u64) -> Self {
        self.fields.extend(offset.to_be_bytes());
        self
    }

    fn text(mut self, text: &[u8]) -> Self {
        // no path, handle or chunk is of such a size
        self = self.number(u32::try_from(text.len()).unwrap_or_default());
        self.fields.extend(text);
        self
    }

    /// Opens a file for reading.
    pub fn open(path: &str) -> Self {
        Self::new(OPEN, &[path.as_bytes()]).number(FOR_READING).number(0)
    }

    /// Makes a file of these permissions for writing, or empties one.
    pub fn create(path: &str, mode: u32) -> Self {
        Self::new(OPEN, &[path.as_bytes()]).number(FOR_WRITING).number(HAS_MODE).number(mode)
    }

    /// Closes what was opened.
    pub fn close(handle: &[u8]) -> Self {
        Self::new(CLOSE, &[handle])
    }

    /// Reads up to [`CHUNK`] bytes.
    pub fn read(handle: &[u8], offset: u64) -> Self {
        Self::new(READ, &[handle]).offset(offset).number(CHUNK.into())
    }

    /// Writes.
    pub fn write(handle: &[u8], offset: u64, data: &[u8]) -> Self {
        Self::new(WRITE, &[handle]).offset(offset).text(data)
    }

    /// Has what was written on the disk.
    pub fn sync(handle: &[u8]) -> Self {
        Self::new(EXTENDED, &[b"fsync@openssh.com", handle])
    }

    /// Asks for the attributes of an open file.
    pub fn attributes(handle: &[u8]) -> Self {
        Self::new(FSTAT, &[handle])
    }

    /// Opens a directory.
    pub fn open_directory(path: &str) -> Self {
        Self::new(OPENDIR, &[path.as_bytes()])
    }

    /// Reads some of the names in a directory.
    pub fn read_directory(handle: &[u8]) -> Self {
        Self::new(READDIR, &[handle])
    }

    /// Removes a file.
    pub fn remove(path: &str) -> Self {
        Self::new(REMOVE, &[path.as_bytes()])
    }

    /// Gives a file another name, which it takes from what had that before.
    pub fn rename(path: &str, name: &str) -> Self {
        Self::new(EXTENDED, &[b"posix-rename@openssh.com", path.as_bytes(), name.as_bytes()])
    }

    /// Gives a file a second name.
    pub fn link(path: &str, name: &str) -> Self {
        Self::new(EXTENDED, &[b"hardlink@openssh.com", path.as_bytes(), name.as_bytes()])
    }

    /// It as it is sent, by a number that its answer will have.
    pub fn bytes(&self, number: u32) -> Vec<u8> {
        let length = u32::try_from(self.fields.len() + 5).unwrap_or_default();
        [&length.to_be_bytes()[..], &[self.kind], &number.to_be_bytes(), &self.fields].concat()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn packet(kind: u8, packet: Packet) -> Vec<u8> {
        Packet { kind, ..packet }.bytes(7)[4..].to_vec()
    }

    #[test]
    fn an_answer_is_what_the_draft_says() {
        let empty = || Packet::new(0, &[]);
        let named =
            |packet: Packet, name: &[u8]| packet.text(name).text(b"-rw-r--r-- long").number(HAS_SIZE | HAS_OWNER | HAS_MODE | HAS_TIMES);
        let attributes = |packet: Packet| packet.offset(1).offset(2).number(3).number(4).number(5);
        for (bytes, expected) in [
            (packet(STATUS, empty().number(2).text(b"No such file").text(b"")), Reply::Code(Code::NOT_FOUND)),
            (packet(HANDLE, empty().text(&[0; 4])), Reply::Handle(vec![0; 4])),
            (packet(DATA, empty().text(b"data")), Reply::Data(b"data".to_vec())),
            (packet(ATTRS, attributes(empty().number(15))), Reply::Modified(5)),
            (packet(ATTRS, empty().number(0)), Reply::Modified(0)),
            (packet(NAME, attributes(named(attributes(named(empty().number(2), b"a")), b"\xff"))), Reply::Names(vec!["a".into()])),
        ] {
            assert_eq!(Reply::parse(&bytes), Some((7, expected)));
            // whatever is cut off is no answer, but for what nobody reads of a status
            for end in 0..bytes.len() {
                let read = Reply::parse(&bytes[..end]);
                assert!(read.is_none() || bytes[0] == STATUS && end >= 9, "{:?}", &bytes[..end]);
            }
        }
        assert_eq!(Reply::parse(&packet(99, empty())), None);
        assert_eq!(Reply::parse(&packet(DATA, empty().number(u32::MAX))), None);
        assert_eq!(Reply::parse(&packet(NAME, empty().number(u32::MAX))), None);
        assert!(is_hello(&[2, 0, 0, 0, 3]) && !is_hello(&[2, 0, 0, 0, 4]) && !is_hello(b"Welcome"));
    }
}
