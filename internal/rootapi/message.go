package rootapi

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"

	"github.com/doppel-dev/doppel/internal/uerr"
)

// Op says what a message is.
type Op string

// Requests of the user daemon, each answered by one OpReply with its ID; rootd's OpPing, answered by OpPong; and its OpChanged, which tells the
// owner of the network of a new State.
const (
	OpSetNetwork   Op = "set-network"
	OpAdoptNetwork Op = "adopt-network"
	OpMarkedSocket Op = "marked-socket"
	OpVersion      Op = "version"
	OpQuit         Op = "quit"
	OpLogLevel     Op = "log-level"
	OpReply        Op = "reply"
	OpPing         Op = "ping"
	OpPong         Op = "pong"
	OpChanged      Op = "changed"
)

// Message is one packet on the socket. A reply with ID 0 is why rootd ends the connection.
type Message struct {
	ID uint64 `json:"id"`
	Op Op     `json:"op"`

	Network *Network `json:"network,omitempty"` // OpSetNetwork, OpAdoptNetwork
	Socket  string   `json:"socket,omitempty"`  // OpMarkedSocket
	IfIdle  bool     `json:"ifIdle,omitempty"`  // OpQuit: not while a network is set
	// Level (error, warn, info or debug; "" is the one it was started with) for so many seconds; 0 is until it is changed again: OpLogLevel
	Level   string `json:"level,omitempty"`
	Seconds int    `json:"seconds,omitempty"`

	State   *State      `json:"state,omitempty"`
	Version *Version    `json:"version,omitempty"`
	Error   *uerr.Error `json:"error,omitempty"`
}

// Encode returns m as one packet.
func (m Message) Encode() ([]byte, error) {
	b, err := json.Marshal(m)
	if err != nil {
		return nil, fmt.Errorf("encode %s: %w", m.Op, err)
	}
	if len(b) > MaxPacket {
		return nil, fmt.Errorf("encode %s: %d bytes, more than %d", m.Op, len(b), MaxPacket)
	}
	return b, nil
}

// Decode reads one packet strictly: one object, no unknown fields, and only the fields that belong to its Op.
func Decode(p []byte) (Message, error) {
	if len(p) > MaxPacket {
		return Message{}, fmt.Errorf("decode: %d bytes, more than %d", len(p), MaxPacket)
	}
	d := json.NewDecoder(bytes.NewReader(p))
	d.DisallowUnknownFields()
	var m Message
	if err := d.Decode(&m); err != nil {
		return Message{}, fmt.Errorf("decode: %w", err)
	}
	if _, err := d.Token(); !errors.Is(err, io.EOF) {
		return Message{}, errors.New("decode: bytes after the message")
	}
	if err := m.check(); err != nil {
		return Message{}, fmt.Errorf("decode: %w", err)
	}
	return m, nil
}

func (m Message) check() error {
	if m.Op == OpChanged && (m.State == nil || m.Version != nil || m.Error != nil) {
		return fmt.Errorf("%q wants a state only", m.Op)
	}
	if m.Op != OpReply && m.Op != OpChanged && (m.State != nil || m.Version != nil || m.Error != nil) {
		return fmt.Errorf("%q with fields of a reply", m.Op)
	}
	if m.Op != OpLogLevel && (m.Level != "" || m.Seconds != 0) {
		return fmt.Errorf("%q with a log level", m.Op)
	}
	if m.Op != OpQuit && m.IfIdle {
		return fmt.Errorf("%q with fields of %q", m.Op, OpQuit)
	}
	hasNet, hasSocket := m.Network != nil, m.Socket != ""
	switch m.Op {
	case OpSetNetwork, OpAdoptNetwork:
		if !hasNet || hasSocket {
			return fmt.Errorf("%q wants a network only", m.Op)
		}
		return m.Network.Validate()
	case OpMarkedSocket:
		if hasNet || !ValidSocket(m.Socket) {
			return fmt.Errorf("%q wants a socket of udp4, udp6, tcp4 or tcp6", m.Op)
		}
	case OpLogLevel:
		if hasNet || hasSocket || m.Seconds < 0 || m.Seconds > MaxLevelSeconds {
			return fmt.Errorf("%q wants a level, and 0 to %d seconds", m.Op, MaxLevelSeconds)
		}
	case OpVersion, OpQuit, OpPing, OpPong, OpChanged, OpReply:
		if hasNet || hasSocket {
			return fmt.Errorf("%q with fields of another", m.Op)
		}
	default:
		return fmt.Errorf("unknown op %q", m.Op)
	}
	return nil
}
