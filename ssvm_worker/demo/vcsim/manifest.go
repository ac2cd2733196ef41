package main

import (
	"crypto/sha1"
	"crypto/sha256"
	"encoding/hex"
	"hash"
	"strings"

	"github.com/vmware/govmomi/simulator"
	"github.com/vmware/govmomi/vim25/methods"
	"github.com/vmware/govmomi/vim25/types"
)

// sums contains the checksums of one file as it was transferred.
type sums struct {
	sha1, sha256 hash.Hash
	size         int64
}

func newSums() *sums { return &sums{sha1: sha1.New(), sha256: sha256.New()} }

func (s *sums) add(data []byte) {
	s.sha1.Write(data)
	s.sha256.Write(data)
	s.size += int64(len(data))
}

// checkedLease is a lease with a manifest of the transferred files.
type checkedLease struct {
	*simulator.HttpNfcLease
	world *world
	mine  *lease
}

// HttpNfcLeaseSetManifestChecksumType sets the checksum types of files, by their keys.
func (l *checkedLease) HttpNfcLeaseSetManifestChecksumType(req *types.HttpNfcLeaseSetManifestChecksumType) soapFault {
	for _, each := range req.DeviceUrlsToChecksumTypes {
		l.mine.chosen[each.Key] = each.Value
	}
	return &methods.HttpNfcLeaseSetManifestChecksumTypeBody{
		Res: new(types.HttpNfcLeaseSetManifestChecksumTypeResponse),
	}
}

// HttpNfcLeaseGetManifest returns the checksums of the transferred files.
func (l *checkedLease) HttpNfcLeaseGetManifest(*types.HttpNfcLeaseGetManifest) soapFault {
	now, _ := l.world.now()
	kind := now.Manifest
	if l.mine.undo != nil && now.UploadManifest != "" {
		kind = now.UploadManifest
	}
	l.world.mu.Lock()
	defer l.world.mu.Unlock()
	entries := []types.HttpNfcLeaseManifestEntry{}
	for _, each := range l.Info.DeviceUrl {
		sent := l.mine.sent[each.TargetId]
		if sent == nil || kind == "absent" {
			continue
		}
		entry := types.HttpNfcLeaseManifestEntry{
			Key: each.Key, Size: sent.size, Disk: *each.Disk, Sha1: hex.EncodeToString(sent.sha1.Sum(nil)),
		}
		if l.mine.chosen[each.Key] == "sha256" {
			entry.ChecksumType, entry.Checksum = "sha256", hex.EncodeToString(sent.sha256.Sum(nil))
		}
		if kind == "wrong" {
			entry.Sha1, entry.Checksum = strings.Repeat("0", 40), strings.Repeat("0", len(entry.Checksum))
		}
		if kind == "zero_size" {
			entry.Size = 0
		}
		entries = append(entries, entry)
	}
	return &methods.HttpNfcLeaseGetManifestBody{Res: &types.HttpNfcLeaseGetManifestResponse{Returnval: entries}}
}
