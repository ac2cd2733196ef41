"""What differs between releases of CloudStack on the wire: packages of classes, new fields, and new commands."""

from __future__ import annotations

from typing import Any

#: The releases that a simulated server can play.
RELEASES = {"4.18": (4, 18, 1), "4.20": (4, 20, 2), "4.23": (4, 23, 0)}

_PACKAGES = {
    "com.cloud.agent.api.": """
        Answer CheckHealthAnswer CheckHealthCommand ComputeChecksumCommand DeleteSnapshotsDirCommand
        GetStorageStatsAnswer GetStorageStatsCommand HandleConfigDriveIsoAnswer HandleConfigDriveIsoCommand
        MaintainAnswer MaintainCommand MigrateAgentConnectionAnswer MigrateAgentConnectionCommand PingAnswer
        PingStorageCommand ReadyAnswer ReadyCommand SecStorageFirewallCfgCommand SecStorageSetupAnswer
        SecStorageSetupCommand SecStorageVMSetupCommand ShutdownCommand StartupAnswer
        StartupSecondaryStorageCommand UnsupportedAnswer AgentControlAnswer BadCommand PingCommand""",
    "com.cloud.agent.api.storage.": """
        CreateDatadiskTemplateAnswer CreateDatadiskTemplateCommand CreateEntityDownloadURLAnswer
        CreateEntityDownloadURLCommand DeleteEntityDownloadURLCommand DownloadAnswer GetDatadisksAnswer
        GetDatadisksCommand ListTemplateAnswer ListTemplateCommand ListVolumeAnswer ListVolumeCommand UploadAnswer""",
    "org.apache.cloudstack.storage.command.": """
        CopyCmdAnswer CopyCommand DeleteCommand DownloadCommand DownloadProgressCommand MoveVolumeCommand
        QuerySnapshotZoneCopyAnswer QuerySnapshotZoneCopyCommand UploadStatusAnswer UploadStatusCommand""",
    "org.apache.cloudstack.storage.command.browser.": "ListDataStoreObjectsAnswer ListDataStoreObjectsCommand",
    "org.apache.cloudstack.agent.lb.": "SetupMSListAnswer SetupMSListCommand",
    "org.apache.cloudstack.ca.": """
        SetupCertificateAnswer SetupCertificateCommand SetupKeyStoreCommand SetupKeystoreAnswer""",
}
_CLASSES = {name: package + name for package, names in _PACKAGES.items() for name in names.split()}

#: The first release that has a class or a field.
_SINCE = {
    "MigrateAgentConnectionCommand": (4, 21, 0),
    "MigrateAgentConnectionAnswer": (4, 21, 0),
    "ListDataStoreObjectsCommand": (4, 19, 0),
    "ListDataStoreObjectsAnswer": (4, 19, 0),
    "QuerySnapshotZoneCopyCommand": (4, 19, 0),
    "QuerySnapshotZoneCopyAnswer": (4, 19, 0),
    "StartupAnswer.hostUuid": (4, 20, 1),
    "StartupAnswer.hostName": (4, 20, 1),
    "ReadyCommand.hostUuid": (4, 20, 1),
    "ReadyCommand.hostName": (4, 20, 1),
    "ReadyCommand.arch": (4, 20, 0),
    "ReadyCommand.avoidMsHostList": (4, 21, 0),
    "PingAnswer.sendStartup": (4, 18, 2),
    "PingAnswer.avoidMsList": (4, 21, 0),
    "PingAnswer.reconcileCommands": (4, 21, 0),
    "DeleteCommand.deleteChain": (4, 23, 0),
    "UploadStatusCommand.abort": (4, 23, 0),
    "SetupMSListCommand.avoidMsList": (4, 21, 0),
    "SetupMSListCommand.triggerHostLb": (4, 21, 0),
}

#: The commands that the server sends one after the other to a host (executeInSequence).
ORDERED = frozenset(
    {
        "ReadyCommand",
        "MaintainCommand",
        "ShutdownCommand",
        "SecStorageSetupCommand",
        "SecStorageVMSetupCommand",
        "ListTemplateCommand",
        "ListVolumeCommand",
        "DeleteSnapshotsDirCommand",
        "ComputeChecksumCommand",
        "DeleteEntityDownloadURLCommand",
    }
)


def class_of(name: str) -> str:
    """Return the full name of a class."""
    return _CLASSES[name]


def knows(release: tuple[int, ...], full_name: str) -> bool:
    """Return whether a server of *release* has this class. It cannot read an answer of another class."""
    name = full_name.rpartition(".")[2]
    return _CLASSES.get(name) == full_name and _SINCE.get(name, (4, 0)) <= release


def fields_of(release: tuple[int, ...], name: str, fields: dict[str, Any]) -> dict[str, Any]:
    """Return the fields that a server of *release* sends for a class."""
    return {each: value for each, value in fields.items() if _SINCE.get(f"{name}.{each}", (4, 0)) <= release}
