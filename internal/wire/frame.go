// Package wire owns the bytes of a tunnel: frames, stream headers, the handshake's messages and error codes; docs/protocol.md specifies them.
package wire

import (
	"encoding/binary"
	"errors"
	"fmt"
	"strings"
	"unicode/utf8"
)

// Sizes of a frame.
const (
	HeaderLen  = 8
	MaxFrame   = 64 << 10
	MaxPayload = MaxFrame - HeaderLen
	// FullPayload is what a DATA frame carries of a long stream of bytes. In TLS 1.3 the frame is four records, of 22 bytes more each (RFC 8446, sections 5.1
	// and 5.2), together 64 KiB: they fill four records of another TLS around it, the API server's. Eight bytes more would be a fifth one, and each record is a write
	// and a wake-up for whoever passes it on.
	FullPayload = MaxFrame - 4*22 - HeaderLen
	// MaxMessage is the longest text of an ERR or GOAWAY frame; a longer one is cut by the sender.
	MaxMessage = 1024
)

// Type is a frame's type.
type Type uint8

// The frame types of protocol version 1.
const (
	TypeOpen    Type = 1  // opener → acceptor: a new stream; payload: its header, first byte Kind
	TypeOK      Type = 2  // acceptor → opener: accepted; payload: the answer
	TypeErr     Type = 3  // acceptor → opener: refused; payload: code u16, UTF-8 text
	TypeData    Type = 4  // bytes or one message
	TypeFin     Type = 5  // end of the sender's direction
	TypeRst     Type = 6  // both directions end at once; payload: code u16
	TypeWindow  Type = 7  // receiver → sender: credit u32 more
	TypeWant    Type = 8  // sender → receiver: stalled, u32 bytes are waiting
	TypeReclaim Type = 9  // receiver → sender: give back unused credit above u32
	TypeReturn  Type = 10 // sender → receiver: u32 bytes of unused credit are given back
	TypePing    Type = 11 // stream 0; payload: 8 bytes to be echoed
	TypePong    Type = 12 // stream 0; payload: the ping's
	TypeGoAway  Type = 13 // stream 0; the session ends; payload: code u16, UTF-8 text
	TypeAck     Type = 14 // stream 0; payload: bytes of the session received so far, u64
)

var typeNames = [...]string{
	TypeOpen: "OPEN", TypeOK: "OK", TypeErr: "ERR", TypeData: "DATA", TypeFin: "FIN", TypeRst: "RST", TypeWindow: "WINDOW",
	TypeWant: "WANT", TypeReclaim: "RECLAIM", TypeReturn: "RETURN", TypePing: "PING", TypePong: "PONG", TypeGoAway: "GOAWAY", TypeAck: "ACK",
}

// String returns the type's name in docs/protocol.md.
func (t Type) String() string {
	if int(t) < len(typeNames) && typeNames[t] != "" {
		return typeNames[t]
	}
	return fmt.Sprintf("type(%d)", uint8(t))
}

// Flags of a frame.
const (
	// FlagFin on OPEN and OK ends the sender's direction with this frame.
	FlagFin uint8 = 0x80
	// WindowMask on OPEN and OK takes the credit that the sender grants: 0 none, else 2^n bytes.
	WindowMask uint8 = 0x1f
	// FlagMessage on DATA: the frame is one message, its boundary is kept.
	FlagMessage uint8 = 0x01
)

// MaxWindowLog is the largest credit an OPEN or OK may grant, as a power of two.
const MaxWindowLog = 26

// MaxCredit bounds the credit a sender may hold on one stream; more is a protocol violation.
const MaxCredit = 1<<31 - 1

// ErrProtocol is what every malformed frame or header is (errors.Is).
var ErrProtocol = errors.New("protocol violation")

func violation(format string, args ...any) error {
	return fmt.Errorf("%w: %s", ErrProtocol, fmt.Sprintf(format, args...))
}

// Header is a frame's header.
type Header struct {
	Type   Type
	Flags  uint8
	Len    int // of the payload, at most MaxPayload
	Stream uint32
}

// Append appends the header's 8 bytes to b.
func (h Header) Append(b []byte) []byte {
	b = append(b, byte(h.Type), h.Flags)
	b = binary.BigEndian.AppendUint16(b, uint16(h.Len))
	return binary.BigEndian.AppendUint32(b, h.Stream)
}

// ParseHeader reads the first 8 bytes of b and checks everything that can be checked without state:
// type, flags, payload length of fixed-size types, stream zero or not.
func ParseHeader(b []byte) (Header, error) {
	if len(b) < HeaderLen {
		return Header{}, violation("frame header of %d bytes", len(b))
	}
	h := Header{Type: Type(b[0]), Flags: b[1], Len: int(binary.BigEndian.Uint16(b[2:])), Stream: binary.BigEndian.Uint32(b[4:])}
	return h, h.check()
}

func (h Header) check() error {
	var flags uint8
	minLen, maxLen, session := 0, 0, false
	switch h.Type {
	case TypeOpen:
		flags, minLen, maxLen = FlagFin|WindowMask, 1, MaxPayload
	case TypeOK:
		flags, maxLen = FlagFin|WindowMask, MaxPayload
	case TypeErr:
		minLen, maxLen = 2, 2+MaxMessage
	case TypeData:
		flags, maxLen = FlagMessage, MaxPayload
	case TypeFin:
	case TypeRst:
		minLen, maxLen = 2, 2
	case TypeWindow, TypeWant, TypeReclaim, TypeReturn:
		minLen, maxLen = 4, 4
	case TypePing, TypePong, TypeAck:
		minLen, maxLen, session = 8, 8, true
	case TypeGoAway:
		minLen, maxLen, session = 2, 2+MaxMessage, true
	default:
		return violation("unknown frame %s", h.Type)
	}
	switch {
	case h.Len < minLen || h.Len > maxLen:
		return violation("%s of %d bytes", h.Type, h.Len)
	case h.Flags&^flags != 0:
		return violation("%s with flags %#02x", h.Type, h.Flags)
	case flags&WindowMask == WindowMask && h.Flags&WindowMask > MaxWindowLog:
		return violation("%s grants 2^%d bytes", h.Type, h.Flags&WindowMask)
	case session != (h.Stream == 0):
		return violation("%s on stream %d", h.Type, h.Stream)
	}
	return nil
}

// Window returns the credit that an OPEN or OK grants.
func (h Header) Window() int {
	if n := h.Flags & WindowMask; n != 0 {
		return 1 << n
	}
	return 0
}

// AppendUint32 appends a whole frame of one of the types that carry a u32.
func AppendUint32(b []byte, t Type, stream, v uint32) []byte {
	b = Header{Type: t, Len: 4, Stream: stream}.Append(b)
	return binary.BigEndian.AppendUint32(b, v)
}

// AppendAck appends a whole ACK frame.
func AppendAck(b []byte, received uint64) []byte {
	b = Header{Type: TypeAck, Len: 8}.Append(b)
	return binary.BigEndian.AppendUint64(b, received)
}

// AppendRst appends a whole RST frame.
func AppendRst(b []byte, stream uint32, c Code) []byte {
	b = Header{Type: TypeRst, Len: 2, Stream: stream}.Append(b)
	return binary.BigEndian.AppendUint16(b, uint16(c))
}

// AppendError appends a whole ERR or GOAWAY frame; msg is cut to MaxMessage bytes.
func AppendError(b []byte, t Type, stream uint32, c Code, msg string) []byte {
	if len(msg) > MaxMessage {
		cut := MaxMessage
		for cut > 0 && !utf8.RuneStart(msg[cut]) {
			cut--
		}
		msg = msg[:cut]
	}
	b = Header{Type: t, Len: 2 + len(msg), Stream: stream}.Append(b)
	b = binary.BigEndian.AppendUint16(b, uint16(c))
	return append(b, msg...)
}

// ParseError reads the payload of ERR and GOAWAY. Text that is not UTF-8 is made so.
func ParseError(p []byte) (Code, string, error) {
	if len(p) < 2 {
		return 0, "", violation("error of %d bytes", len(p))
	}
	return Code(binary.BigEndian.Uint16(p)), strings.ToValidUTF8(string(p[2:]), "\uFFFD"), nil
}

// ParseUint32 reads the payload of WINDOW, WANT, RECLAIM and RETURN.
func ParseUint32(p []byte) (uint32, error) {
	if len(p) != 4 {
		return 0, violation("number of %d bytes", len(p))
	}
	return binary.BigEndian.Uint32(p), nil
}

// ParseAck reads the payload of ACK.
func ParseAck(p []byte) (uint64, error) {
	if len(p) != 8 {
		return 0, violation("ACK of %d bytes", len(p))
	}
	return binary.BigEndian.Uint64(p), nil
}

// ParseRst reads the payload of RST.
func ParseRst(p []byte) (Code, error) {
	if len(p) != 2 {
		return 0, violation("RST of %d bytes", len(p))
	}
	return Code(binary.BigEndian.Uint16(p)), nil
}
